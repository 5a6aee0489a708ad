"""The world of moving shapes and the bundled video transformer."""

import pytest
import torch

import gossamer as gs
from gossamer.testbed.train_video import rate
from gossamer.testbed.video import (
    COLOURS,
    FRAMES,
    PATCH,
    SIZE,
    WORDS,
    Sizes,
    VideoTransformer,
    denoising_loss,
    loss,
    patchify,
    psnr,
    sample,
    unpatchify,
    video_transformer,
    videos,
)

GRID = gs.TokenGrid(FRAMES, SIZE // PATCH, SIZE // PATCH, text=len(WORDS))


def test_videos_show_what_the_words_say():
    video, words = videos(64, torch.Generator().manual_seed(0))
    assert video.shape == (64, FRAMES, 3, SIZE, SIZE) and video.abs().max() <= 1
    assert all((words[:, i] >= 0).all() and (words[:, i] < n).all() for i, n in enumerate(WORDS))
    again, _ = videos(64, torch.Generator().manual_seed(0))
    assert torch.equal(video, again)
    for each, row in zip(video, words.tolist(), strict=True):
        colour = torch.tensor(COLOURS[row[0]]).reshape(3, 1, 1)
        share = ((each - colour).abs().amax(1) < 0.02).double().mean((1, 2))
        assert (share > 0.005).all(), "the shape is in every frame"
    moved = (video[:, 1:] - video[:, :-1]).abs().flatten(1).mean(1)
    fast, slow = (moved[words[:, 3] == i].mean() for i in (1, 0))
    assert fast > 1.3 * slow > 0


def test_patches_are_undone():
    video, _ = videos(2, torch.Generator().manual_seed(1))
    tokens = patchify(video)
    assert tokens.shape == (2, GRID.video, 12)
    assert torch.equal(unpatchify(tokens, FRAMES, GRID.height, GRID.width), video)
    assert torch.equal(tokens[0, 1], video[0, 0, :, :2, 2:4].flatten())


def test_psnr_is_in_decibels_of_a_range_of_two():
    video = torch.zeros(2, 1, 3, 4, 4)
    assert psnr(video, video + 0.2) == pytest.approx(20, abs=1e-4)
    assert psnr(video + 3, video + 5) > 100, "beyond the range all is white"


def test_training_learns_from_its_first_steps():
    torch.manual_seed(0)
    model = VideoTransformer(Sizes(32, 2, 1, 64))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    video, words = videos(2, torch.Generator().manual_seed(0), frames=2, size=8)
    noise, time, losses = torch.randn(video.shape), torch.tensor([0.3, 0.7]), []
    for _ in range(8):
        found = loss(model, video, words, noise, time)
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
        losses.append(found.item())
    assert losses[-1] < losses[0] and rate(0, 900) < rate(49, 900) > rate(899, 900) > 0.09


def test_the_bundled_model_denoises():
    model = video_transformer()
    assert sum(p.numel() for p in model.parameters()) < 1e6
    assert (
        denoising_loss(model, 0, [0.5], count=1)
        < 0.25
        < denoising_loss(VideoTransformer(), 0, [0.5], count=1)
    )


@pytest.mark.slow
def test_samples_heed_the_words_and_sparse_ones_come_near_the_dense():
    model, words = video_transformer(), torch.tensor([[0, 1, 2, 0]])
    dense = sample(model, words, 0, steps=5)
    assert torch.equal(dense, sample(model, words, 0, steps=5))
    assert psnr(dense, sample(model, torch.tensor([[2, 1, 2, 0]]), 0, steps=5)) < 40  # a little
    found = {}
    for density in (0.3, 1.0):
        method = gs.attention.AdaSpa(density, first=0.2, again=0.4)
        with gs.sparse_denoising(model, method, steps=5, grid=GRID) as run:
            found[density] = psnr(sample(model, words, 0, steps=5, before=run.step), dense)
    assert run.result.layers == 4 and 12 < found[0.3] < found[1.0] and found[1.0] > 60
