"""The three scripts on real COCO files, if present: 80 train images, 1,000 of the 5,000 val images."""

import json

import pytest

import cache_embeddings
import eval as evaluation
import report
import train


@pytest.mark.long
def test_scripts_run_on_real_files(shared, one_figure, tmp_path, monkeypatch, refusal, capsys):
    monkeypatch.chdir(tmp_path)
    root = shared / "data" / "coco"
    names = ["--dataset", "coco", "--backbone", "shapes-tiny"]
    error = refusal(cache_embeddings.main, *names, "--root", str(root), "--quiet")
    assert "4,000 of the 5,000 images of 'val' are absent from" in error and "--on-error skip" in error
    cache_embeddings.main([*names, "--root", str(root), "--quiet", "--on-error", "skip"])
    output = capsys.readouterr().out
    assert "80 images, 400 captions" in output and "1,000 images" in output and "4,000 left out" in output
    for method, settings in (("asymvlm-psd", ["train.epochs=3", "model.width=32"]), ("clip", ["train.epochs=3"])):
        run = [*names, "--method", method, "--quiet"]
        train.main([*run, "--set", "train.batch_size=100", *settings])
        evaluation.main(run)
    result = json.loads((tmp_path / "results/coco/shapes-tiny/asymvlm-psd/seed0/coco-retrieval.json").read_text())
    assert result["images"] == 1000 and 5000 <= result["captions"] <= 5020 and result["skipped"] == 4000
    side = result["text_to_image"]
    assert "bayes_recall" not in side and len(side["uncertainty"]["query"]["levels"]["count"]) == 10
    report.main(["--dataset", "coco"])
    assert "asymvlm-psd" in capsys.readouterr().out
