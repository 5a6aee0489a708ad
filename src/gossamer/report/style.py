"""The look of every page, light and dark, wide and narrow."""

STYLE = """
:root { --ink:#1a1d21; --soft:#5c6670; --line:#dfe3e8; --paper:#fff; --bar:#2f6f8f; --mid:#8fb8cc;
  --dense:#b7c3cc; --tint:#f4f7f9 }
@media (prefers-color-scheme: dark) { :root { --ink:#e8eaed; --soft:#9aa4ae; --line:#343a41;
  --paper:#15181b; --bar:#6db3d6; --mid:#3d6479; --dense:#55606a; --tint:#1d2226 } }
* { box-sizing:border-box }
body { margin:0; background:var(--paper); color:var(--ink);
  font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif }
main { max-width:60rem; margin:0 auto; padding:2rem 1.25rem 4rem }
h1 { font-size:1.7rem; line-height:1.2; margin:0 0 .25rem; overflow-wrap:anywhere }
h2 { font-size:1.15rem; margin:2.5rem 0 .75rem }
p { margin:.4rem 0; overflow-wrap:anywhere } .soft { color:var(--soft) }
.cards { display:grid; grid-template-columns:repeat(auto-fit,minmax(11rem,1fr)); gap:.75rem;
  margin:1.5rem 0 }
.card { background:var(--tint); border:1px solid var(--line); border-radius:.6rem;
  padding:.8rem 1rem }
.card b { display:block; font-size:1.5rem; font-variant-numeric:tabular-nums }
.wide { overflow-x:auto }
table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums }
th,td { text-align:right; padding:.4rem .6rem; border-bottom:1px solid var(--line);
  vertical-align:top }
th:first-child,td:first-child { text-align:left; overflow-wrap:anywhere }
th { color:var(--soft); font-weight:600 }
.left td:nth-child(2),.left th:nth-child(2) { text-align:left } .left td:first-child { min-width:16rem }
.layers td:last-child,.layers th:last-child { text-align:left; overflow-wrap:anywhere }
.layers td { white-space:nowrap }
.layers td:first-child,.layers td:last-child { white-space:normal }
.total td { font-weight:600; border-bottom:0 }
.track { background:var(--dense); height:.55rem; width:4rem; border-radius:.3rem;
  display:inline-block; margin-left:.4rem }
.track i { background:var(--bar); height:100%; display:block; border-radius:.3rem }
.shares { display:flex; height:1rem; border-radius:.4rem; overflow:hidden; margin:.6rem 0 }
.legend span { margin-right:1rem; white-space:nowrap }
.legend i { display:inline-block; width:.7rem; height:.7rem; border-radius:.2rem;
  margin-right:.35rem }
pre { background:var(--tint); border:1px solid var(--line); border-radius:.6rem;
  padding:.8rem 1rem; white-space:pre-wrap; overflow-wrap:anywhere; font-size:.9rem }
svg { width:100%; height:auto; max-width:36rem } svg text { fill:var(--soft); font-size:12px }
svg .on { fill:var(--ink); paint-order:stroke; stroke:var(--paper); stroke-width:4px }
details { margin-top:1rem } details summary { cursor:pointer }
@media (max-width:620px) {
  main { padding:1.25rem .9rem 3rem } th,td { padding:.35rem .3rem; font-size:.86rem }
  .layers thead,.left thead { display:none } .left td:first-child { min-width:0 }
  .left tr { display:flex; flex-wrap:wrap; gap:0 .8rem; padding:.45rem 0;
    border-bottom:1px solid var(--line) } .left td { border:0; padding:0; text-align:left }
  .left td:first-child { flex-basis:100%; font-weight:600 } .left td:nth-child(2) { flex-basis:100% }
  .left td:nth-child(3)::after { content:" of them" }
  .left td:nth-child(4)::after { content:" weights" }
  .layers tr { display:flex; flex-wrap:wrap; gap:0 .8rem; padding:.45rem 0;
    border-bottom:1px solid var(--line) }
  .layers td { border:0; padding:0; text-align:left } .layers td:empty { display:none }
  .layers td:first-child,.layers td:last-child { flex-basis:100% }
  .layers td:nth-child(2)::after { content:" of them" } .layers td:first-child { font-weight:600 }
  .layers td:nth-child(4)::before { content:"density " }
  .layers td:nth-child(5)::after { content:" weights" }
}
"""
