"""Training beyond memory: every pair once an epoch, the embeddings of the cache, and the weights of an unbroken run."""

import signal

import numpy as np
import pytest
import torch

import eval as evaluation
import train
from datasets import streaming
from datasets.embeddings import Pairs
from datasets.streaming import InMemory, OnDisk
from metrics import score_tiles
from models import memory
from models.base import Embedding, cosine
from models.pcmepp import PCMEPP
from tasks import retrieval
from utils.checkpoint import Run
from utils.config import load_config

COMMAND = ["--dataset", "shapes", "--method", "pcmepp", "--quiet", "--device", "cpu"]
SETTINGS = ["--set", "train.epochs=3", "train.batch_size=128", "model.width=16", "train.val_fraction=0"]


@pytest.fixture
def small(monkeypatch):
    """Blocks of 16 captions and windows of three batches of 128, so that 1,500 captions make four."""
    monkeypatch.setattr(streaming, "BLOCK", 16)
    monkeypatch.setattr(streaming, "WINDOW", 400)


def epoch(data, rows, batch, first=0):
    torch.manual_seed(5)
    return list(data.batches(data.order(rows, batch), batch, first))


def test_an_epoch_from_disk_has_every_pair_once_and_as_in_memory(world, small):
    pairs = Pairs("shapes", "shapes-tiny", "train")
    disk, memory_of = OnDisk(pairs, torch.device("cpu")), InMemory(*pairs.to("cpu"))
    rows = torch.arange(len(pairs.text))[7:]
    batches = epoch(disk, rows, 128)
    assert [len(chosen) for chosen, _ in batches] == [128] * 11 + [85]
    order = torch.cat([chosen for chosen, _ in batches])
    assert sorted(order.tolist()) == rows.tolist() and order.tolist() != rows.tolist()
    for chosen, (image, text) in batches:
        assert text.equal(torch.from_numpy(np.array(pairs.text[chosen.numpy()])).float())
        assert image.equal(torch.from_numpy(np.array(pairs.image[pairs.image_of_text[chosen.numpy()]])).float())
    # A window has whole blocks of neighbours, all but the two that its ends cut.
    for window in order[: 3 * 384].split(384):
        blocks = torch.unique(torch.sort(window).values.diff(), return_counts=True)
        assert dict(zip(*(part.tolist() for part in blocks)))[1] >= 384 - 2 * 384 // 16 - 4
    later = epoch(disk, rows, 128, first=4)
    assert torch.cat([chosen for chosen, _ in later]).equal(order[4 * 128 :])
    assert epoch(disk, rows, 128, first=12) == []
    some = torch.tensor([1400, 3, 3, 77])
    assert all(map(torch.equal, disk.take(some), memory_of.take(some)))
    assert not epoch(disk, rows, 128)[0][0].equal(disk.order(rows, 128)[:128])


def test_one_window_of_single_captions_is_a_full_shuffle(world, monkeypatch):
    """The order in memory is one permutation; on disk it is one, too, where a window holds everything."""
    pairs = Pairs("shapes", "shapes-tiny", "train")
    monkeypatch.setattr(streaming, "WINDOW", 10**6)
    torch.manual_seed(0)
    order = OnDisk(pairs, torch.device("cpu")).order(torch.arange(1500), 128)
    assert order.sort().values.equal(torch.arange(1500))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.1


def weights(tag):
    return Run(load_config("shapes", "pcmepp", tag=tag)).load("cpu")[0].state_dict()


def test_a_run_from_disk_goes_on_at_the_same_step(world, small, monkeypatch):
    """PCME++ draws random numbers in every step. What chose the order, memory, is asked once a run."""
    command = [*COMMAND, "--tag", "whole", *SETTINGS]
    monkeypatch.setattr(memory, "SHARE", 0.0)  # nothing fits
    train.main(command)
    loss, calls = PCMEPP.loss, []

    def interrupted(self, *args):
        calls.append(0)
        if len(calls) == 17:  # the fifth step of the second epoch, in its second window
            signal.raise_signal(signal.SIGTERM)
        return loss(self, *args)

    command[command.index("whole")] = "broken"
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(PCMEPP, "loss", interrupted)
        train.main(command)
    state = Run(load_config("shapes", "pcmepp", tag="broken")).resume()
    assert state["inside"]["step"] == 5 and state["in_memory"] is False
    monkeypatch.setattr(memory, "SHARE", 1.0)
    train.main(command)
    torch.testing.assert_close(weights("broken"), weights("whole"), rtol=0, atol=0, equal_nan=True)
    command[command.index("broken")] = "memory"
    train.main([*command, "train.in_memory=true"])
    assert not weights("memory")["text_log_variance.0.weight"].equal(weights("whole")["text_log_variance.0.weight"])


def test_a_long_epoch_is_saved_within(world, small, monkeypatch):
    command = [*COMMAND, "--tag", "whole", *SETTINGS]
    train.main(command)
    monkeypatch.setattr(train, "WITHIN", 0)
    loss, calls = PCMEPP.loss, []

    def killed(self, *args):
        calls.append(0)
        if len(calls) == 17:  # the fifth step of the second epoch
            raise ChildProcessError
        return loss(self, *args)

    command[command.index("whole")] = "killed"
    with monkeypatch.context() as patch, pytest.raises(ChildProcessError):
        patch.setattr(PCMEPP, "loss", killed)
        train.main([*command, "train.save_every=0"])
    state = Run(load_config("shapes", "pcmepp", tag="killed")).resume()
    assert len(state["log"]) == 1 and state["inside"]["step"] == 4
    train.main([*command, "train.save_every=0"])
    torch.testing.assert_close(weights("killed"), weights("whole"), rtol=0, atol=0, equal_nan=True)


def test_free_memory_is_what_system_and_job_leave(tmp_path, monkeypatch):
    gigabyte = 2**30
    assert memory.fits(2**10, "cpu") and not memory.fits(2**60, "cpu")
    monkeypatch.setattr(memory, "_left_to_group", lambda: [3 * gigabyte])
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("Free", (), {"available": 8 * gigabyte}))
    assert memory.fits(1.5 * gigabyte, "cpu") and not memory.fits(1.6 * gigabyte, "cpu")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "_left_to_group", lambda: [gigabyte // 512])
    row, nothing, number = memory.empty([torch.zeros(2**10), None, torch.tensor(0)], 2**10)
    assert row.fill_(2.0).sum() == 2**21 and nothing is None and number.shape == (2**10,)
    assert number.dtype == torch.int64 and not list(tmp_path.iterdir())  # its file has no name


def test_evaluation_without_memory_has_the_same_bytes(world, monkeypatch):
    """Adapted embeddings lie in files then; the gallery is scored in blocks, which rounds differently at most."""
    command = [*COMMAND[:2], "--method", "asymvlm-psd", "--quiet", "--device", "cpu"]
    train.main([*command, "--set", "train.epochs=1", "model.width=16"])
    evaluation.main(command)
    results = [
        world / f"results/shapes/shapes-tiny/asymvlm-psd/seed0/shapes-retrieval.{end}" for end in ("json", "npz")
    ]
    expected = [path.read_bytes() for path in results]
    in_file, files = memory._in_file, []
    monkeypatch.setattr(memory, "SHARE", 0.0)
    monkeypatch.setattr(
        memory, "_in_file", lambda *shape, **options: (files.append(shape), in_file(*shape, **options))[1]
    )
    evaluation.main(command)
    assert [path.read_bytes() for path in results] == expected and len(files) >= 6


def test_a_gallery_scored_in_blocks_has_the_same_scores(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    image, text = (Embedding(torch.randn(count, 4, generator=generator)) for count in (50, 90))
    monkeypatch.setattr(retrieval, "STORED_SCORES", 0)
    whole, parted = [], []
    for scores, size in ((whole, 1000), (parted, 16)):
        monkeypatch.setattr(retrieval, "GALLERY", size)
        both = retrieval.sides(cosine, image, text, np.arange(90) % 50, 1.0)
        scores += [side.score(slice(3, 40)) for side in both.values()]
    assert [score.shape for score in parted] == [(37, 50), (37, 90)]
    torch.testing.assert_close(parted, whole, rtol=0, atol=1e-6)
    exact = cosine(*(Embedding(each.mean.double()) for each in (image, text)))
    torch.testing.assert_close([score.double() for score in parted], [exact.T[3:40], exact[3:40]], rtol=0, atol=1e-6)
    assert all(score.is_contiguous() for score in parted)  # what reads transposed scores takes twice as long


def test_blocks_of_a_gallery_are_even(monkeypatch):
    """2,049 items, as 2,048 are a block: a product with one would round scores otherwise, and equal items not tie."""
    monkeypatch.setattr(retrieval, "STORED_SCORES", 0)
    few, many, shapes = Embedding(torch.randn(3, 4)), Embedding(torch.randn(retrieval.GALLERY + 1, 4)), []

    def compute(image, text):
        shapes.append((len(image.mean), len(text.mean)))
        return cosine(image, text)

    retrieval.sides(compute, few, many, np.arange(len(many.mean)), 1.0)["image_to_text"].score(slice(0, 3))
    retrieval.sides(compute, many, few, np.arange(3), 1.0)["text_to_image"].score(slice(0, 3))
    assert shapes == [(3, 1024), (3, 1025), (1024, 3), (1025, 3)]


def test_equal_images_tie_in_stored_scores():
    """257 images, as 256 are a tile: a product with one would round otherwise."""
    images, texts = score_tiles.ROWS + 1, score_tiles.COMPUTED // score_tiles.ROWS + 16
    image, text = torch.randn(images, 64), torch.randn(texts, 64)
    image[-1] = image[3]
    both = retrieval.sides(cosine, Embedding(image), Embedding(text), np.arange(texts) % images, 1.0)
    scores = both["text_to_image"].score(slice(0, texts))
    assert torch.equal(scores[:, 3], scores[:, -1])
