"""The benchmarks of speed: what they compare is equal, and every figure that they promise is printed."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import cost, gpu, run
from benchmarks.measure import Case, machine, medians, processor, resident
from benchmarks.speed.evaluation import evaluation
from utils.device import pick_device

CPU = pick_device("cpu")


def test_calls_take_turns():
    called, clock = [], iter(range(100))
    calls = [lambda name=name: called.append(name) for name in "ab"]
    assert medians(calls, CPU, 2, clock=lambda: next(clock)) == [1, 1]
    assert called == list("abab")


def test_a_row_has_ratio_and_floor(monkeypatch):
    """Ours takes two seconds, the textbook five for a third of the work, a product of half the operations one."""
    monkeypatch.setattr(run, "best_product", lambda device: (None, 50.0))
    monkeypatch.setattr(run, "medians", lambda *args: [2.0, 5.0, 1.0])
    monkeypatch.setattr(run, "in_fresh_process", lambda name, which, device: {"ours": 10, "textbook": 25}[which])
    case = Case(lambda: None, lambda: None, 75.0, parts=3, memory=True, note="{:.0f} s".format)
    lines = list(run.rows("name", case, CPU, busy=True))
    assert lines == [
        "| `name` | processor, 1 thread | 2,000 ms | 15,000 ms | 7.5 | 1,500 ms | 75 % |",
        "|  | 2 s |  |  |  |  |  |",
        "|  | memory | 10 MB | 25 MB | 2.5 |  |  |",
    ]


def test_different_results_are_not_timed():
    with pytest.raises(AssertionError, match="not close"):
        run.compare(Case(lambda: [1.0], lambda: [1.1]))
    run.compare(Case(lambda: [1.0], lambda: [1.0001]))


def test_the_machine_is_named():
    assert processor() and machine(CPU).startswith(processor()) and torch.__version__.partition("+")[0] in machine(CPU)


@pytest.mark.parametrize("name", run.CASES)
def test_every_case_says_what_it_measures(name):
    text = run.CASES[name].__doc__
    assert "against" in text and "{" not in text


def test_evaluation_in_tiles_has_the_recalls_of_the_matrix(monkeypatch):
    for name, size in (("IMAGES", 40), ("TEXTS", 203), ("DIM", 16)):
        monkeypatch.setattr(f"benchmarks.speed.evaluation.{name}", size)
    run.compare(evaluation(CPU))


def test_the_gpu_benchmark_prints_every_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "METHODS", ("pfe",))
    monkeypatch.chdir(tmp_path)
    gpu.main(["--small", "--device", "cpu", "--seeds", "1"])
    printed = capsys.readouterr().out
    for row in ("| asymvlm-psd | float32 |", "| asymvlm-psd | bfloat16 |", "| the textbook loop", "| pfe | float32 |"):
        assert row in printed
    assert "The loss of 512 pairs with gradients" in printed and "eval.py of 40 images and 200 captions" in printed
    assert not list(tmp_path.iterdir())


def test_the_gpu_benchmark_needs_a_gpu(refusal):
    assert "a CPU would take hours" in refusal(gpu.main, "--device", "cpu")


def test_the_textbook_starts_its_loader_once_an_epoch(tmp_path, monkeypatch):
    """An epoch of n batches takes 7 + 3 n seconds; 1,000 captions are 250 batches of 4."""
    folder = tmp_path / "embeddings/d/train"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name, rows in (("image", 200), ("text", 1000)):
        np.save(folder / f"{name}.npy", np.zeros((rows, gpu.DIM), np.float16))
    epochs = []
    monkeypatch.setattr(gpu, "BATCH", 4)
    monkeypatch.setattr(gpu, "perceptron", lambda *_: torch.nn.Linear(gpu.DIM, gpu.DIM))
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda _, batch_size, sampler, num_workers: epochs.append(
        len(sampler) // batch_size) or [])  # fmt: skip
    monkeypatch.setattr(gpu, "seconds", lambda call, device: call() or 7 + 3 * epochs[-1])
    assert gpu.textbook(gpu.Size(images=200), CPU) == 7 + 3 * 250
    assert epochs == [2, 2, 22]


def test_mistakes_are_told_in_one_sentence(refusal):
    assert "--points must be at least 1, not 0." in refusal(cost.main, "--points", "0", "--device", "cpu")
    if not torch.cuda.is_available():
        assert "cuda" in refusal(cost.main, "--device", "cuda")
        assert "cuda" in refusal(run.main, "--device", "cuda")


def test_memory_where_there_is_no_proc(monkeypatch):
    expected = resident("VmRSS")

    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", missing)
    assert resident("VmRSS") == pytest.approx(expected, rel=0.1) and resident("VmHWM") > 0


def test_cost_is_drawn_for_every_axis(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cost, "SIZES", {"batch": (16, 32), "gallery": (300, 600)})
    cost.main(["--figure", str(tmp_path / "cost.png"), "--device", "cpu"])
    assert (tmp_path / "cost.png").read_bytes()[1:4] == b"PNG"
    assert capsys.readouterr().out.count(" ms | ") == 8
