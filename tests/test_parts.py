"""Embeddings in parts: read as one array, cached by several processes or left where clip-retrieval wrote them."""

import os
import shutil

import numpy as np
import pytest
import torch
from conftest import forked_ranks

import cache_embeddings
import eval as evaluation
import train
from datasets import blocks, caching
from datasets.arrays import Arrays
from datasets.embeddings import Pairs
from datasets.parts import Parts, choose
from utils.errors import UserError

LAION = ["--dataset", "embeddings", "--splits", "all", "--quiet", "--root", "laion"]


@pytest.fixture
def laion(tmp_path, monkeypatch):
    """clip-retrieval's layout: 12 pairs in the first and the last of three parts; returns images and texts (12, 8)."""
    monkeypatch.chdir(tmp_path)
    arrays = np.random.default_rng(0).normal(size=(2, 12, 8)).astype(np.float16)
    for kind, array in zip(("img_emb", "text_emb"), arrays, strict=True):
        (tmp_path / "laion" / kind).mkdir(parents=True)
        for number, rows in enumerate(np.split(array, [6, 6])):
            np.save(f"laion/{kind}/{kind}_{number}.npy", rows)
    return arrays


def damage(path, place, content):
    """Overwrite bytes of a file from a place on, which neither its size nor its time shows."""
    stat = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_parts_are_indexed_like_their_concatenation(tmp_path):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(count, 3)).astype(np.float16) for count in (4, 1, 7)]
    paths = [tmp_path / f"{number}.npy" for number in range(3)]
    for path, array in zip(paths, arrays, strict=True):
        np.save(path, array)
    np.save(paths[2], arrays[2].astype(np.float32))  # other floats are read as float16
    whole, parts = np.concatenate(arrays), Parts(paths, [4, 1, 7])
    rows = rng.permutation(12)[:9]
    mask = np.isin(np.arange(12), rows)
    for index in (slice(None), slice(3, 9), slice(10, 40), [11, 0, 4, 4], np.array([], dtype=int), mask):
        assert (parts[index] == whole[index]).all() and parts[index].dtype == np.float16, index
    for array in (parts, np.load(paths[0], mmap_mode="r")):
        whole = np.array(array)
        some = choose(choose(array, [3, 0, 2, 1]), [True, False, True, True])
        assert isinstance(some, Parts) and some.shape == (3, 3) and (some[:] == whole[[3, 2, 1]]).all()
    assert np.array(parts, dtype=np.float32).dtype == np.float32


def test_two_processes_write_parts_that_open_as_one(world, small_world, monkeypatch, refusal):
    """The cache of parts is that of one file, and a method trains on it to the same weights."""
    (world / "embeddings").unlink()
    shutil.copytree(small_world / "embeddings", world / "embeddings")
    whole = Pairs("shapes", "shapes-tiny", "val")
    image, text, items = whole.image[:].copy(), whole.text[:].copy(), whole.items
    run = ["--dataset", "shapes", "--method", "asymvlm-psd", "--quiet", "--device", "cpu"]
    short = ["--set", "train.epochs=1", "model.width=16", "data.train_split=val"]
    train.main([*run, "--tag", "whole", *short])
    folder = world / "embeddings/shapes/shapes-tiny/val"
    shutil.rmtree(folder)
    for name, size in (("BLOCK", 8), ("TEXTS", 64)):
        monkeypatch.setattr(blocks, name, size)
    command = ["--dataset", "shapes", "--splits", "val", "--quiet", "--device", "cpu", "--workers", "0", "--set"]
    command += ["data.options.train_images=300", "data.options.val_images=100", "encoder.batch_size=8"]
    monkeypatch.setattr(caching, "PART", 40)
    read = blocks.BlockEncoder.parts

    def parts(encoder, kind, count, chosen=slice(None)):
        if chosen == slice(None):
            (world / f"{encoder.ranks.rank} reads all").touch()
        return read(encoder, kind, count, chosen)

    monkeypatch.setattr(blocks.BlockEncoder, "parts", parts)
    results = forked_ranks(2, cache_embeddings.main, command)
    assert [code for code, *_ in results] == [0, 0], results
    assert [path.name for path in world.glob("* reads all")] == ["0 reads all"]
    files = sorted(path.name for path in folder.glob("image-*.npy"))
    assert files == [f"image-0000{number}.npy" for number in range(3)] and not (folder / "image.npy").exists()
    parted = Pairs("shapes", "shapes-tiny", "val")
    np.testing.assert_allclose(parted.image[:], image, atol=2e-3)  # batches of another size round differently
    np.testing.assert_allclose(parted.text[:], text, atol=2e-3)
    assert parted.items == items and [len(parted.image), len(parted.text)] == [100, 500]
    assert cache_embeddings.main(command) is None  # there already
    np.save(folder / files[1], image[40:80])
    for number, rows in ((0, slice(40)), (2, slice(80, 100))):
        np.save(folder / files[number], image[rows])
    for path, rows in zip(sorted(folder.glob("text-*.npy")), np.split(text, range(64, 500, 64)), strict=True):
        np.save(path, rows)
    train.main([*run, "--tag", "parts", *short])
    ours, theirs = (
        torch.load(f"checkpoints/shapes/shapes-tiny/asymvlm-psd+{tag}/seed0/adaptor.pt", weights_only=True)
        for tag in ("parts", "whole")
    )
    torch.testing.assert_close(ours["state_dict"], theirs["state_dict"], rtol=0, atol=0, equal_nan=True)
    for content, state in ((b"half", "has changed since"), (None, "is missing, and")):
        (folder / files[1]).unlink() if content is None else (folder / files[1]).write_bytes(content)
        assert f"{files[1]} {state}" in refusal(train.main, *run, "--tag", "lost", *short)
    assert f"{files[1]}, which is missing or has changed since" in refusal(cache_embeddings.main, *command)
    cache_embeddings.main([*command, "--overwrite"])
    np.testing.assert_allclose(Pairs("shapes", "shapes-tiny", "val").image[:], image, atol=2e-3)


def test_clip_retrievals_files_stay_where_they_are(tmp_path, monkeypatch, refusal):
    """Results are those of the same embeddings in one file; a part that has changed since is refused."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    image = rng.normal(size=(60, 8)).astype(np.float16)
    text = (image + rng.normal(size=(60, 8))).astype(np.float16)
    for kind, array in (("img_emb", image), ("text_emb", text)):
        (tmp_path / "laion" / kind).mkdir(parents=True)
        for number, rows in enumerate((slice(25), slice(25, 60))):  # numbers have leading zeros
            np.save(f"laion/{kind}/{kind}_{number:02d}.npy", array[rows])
    np.savez("pairs.npz", image=image, text=text)
    cache, run = ["--dataset", "embeddings", "--quiet", "--root"], ["--dataset", "embeddings"]
    run += ["--method", "asymvlm-psd", "--device", "cpu", "--quiet"]
    seen = {}
    for root in ("pairs.npz", "laion"):
        for folder in ("embeddings", "checkpoints"):
            shutil.rmtree(folder, ignore_errors=True)
        cache_embeddings.main([*cache, root])
        train.main([*run, "--set", "train.epochs=2", "model.width=16"])
        evaluation.main(run)
        arrays = dict(np.load("results/embeddings/given/asymvlm-psd/seed0/embeddings-retrieval.npz"))
        for name, values in seen.setdefault("arrays", arrays).items():
            np.testing.assert_array_equal(values, arrays[name], err_msg=name)
    folder = tmp_path / "embeddings/embeddings/given/train0"
    assert (folder / "image_rows.npy").is_file() and not list(folder.glob("image.npy"))
    np.save("laion/img_emb/img_emb_01.npy", image[25:] + 1)
    assert "img_emb_01.npy has changed since" in refusal(evaluation.main, *run)


def test_what_a_refusal_names_repairs_a_cache_in_place(laion, refusal):
    """Parts that were touched, moved, or replaced while they were cached; one without rows is left out."""
    cache_embeddings.main(LAION)
    os.utime("laion/img_emb/img_emb_2.npy", (0, 0))
    moved = [*LAION[:-1], "moved"]
    for command, state in ((LAION, "img_emb_2.npy has changed since"), (moved, "img_emb_0.npy is missing, and")):
        with pytest.raises(UserError, match=f"{state} .* --overwrite`, with --root"):
            Pairs("embeddings", "given", "all")
        error = refusal(cache_embeddings.main, *command)
        assert ", which is missing or has changed since: replace it with --overwrite" in error
        cache_embeddings.main([*command, "--overwrite"])
        pairs = Pairs("embeddings", "given", "all")
        np.testing.assert_array_equal([pairs.image[:], pairs.text[:]], laion)
        cache_embeddings.main(command)  # there already
        if command is LAION:
            os.rename("laion", "moved")


def test_a_part_replaced_while_it_is_cached_is_noticed(laion, monkeypatch, capsys):
    """Its old content is in the cache's fingerprint."""
    image = "laion/img_emb/img_emb_2.npy"

    def write(*arguments):
        np.save(image, laion[0, 6:] + 1)
        caching.write_given(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cache_embeddings, "write_given", write)
        cache_embeddings.main(LAION)
    with pytest.raises(UserError, match=r"img_emb_2\.npy has changed since"):
        Pairs("embeddings", "given", "all")
    cache_embeddings.main([*LAION, "--overwrite"])
    assert (Pairs("embeddings", "given", "all").image[6:] == laion[0, 6:] + 1).all()


def test_the_damaged_part_is_named(laion):
    """By its own path, with rows counted within it, in a cache and in a fold of one."""
    cache_embeddings.main(LAION)
    pairs, fold = Pairs("embeddings", "given", "all"), Pairs("embeddings", "given", "train1of2")
    for row in range(len(fold.text)):
        (path, rows), *others = fold.by_file("text", np.array([row]))
        assert (np.load(path)[rows] == fold.text[[row]]).all() and not others
    (first, low), (last, high) = pairs.by_file("image", np.array([7, 2, 11]))
    assert (first.name, last.name) == ("img_emb_0.npy", "img_emb_2.npy") and [*low, *high] == [2, 1, 5]

    damage(last, last.stat().st_size - 28, np.full(14, np.nan, np.float16).tobytes())
    with pytest.raises(UserError, match=r"/img_emb_2\.npy holds NaN or infinity in rows 4 and 5: delete"):
        pairs.must_be_finite()
    damage(last, 10, b"{" * 9)
    with pytest.raises(UserError, match=r"/img_emb_2\.npy cannot be read \(.*\): restore it, or delete the cache"):
        Pairs("embeddings", "given", "all").image[:]
    damage(first, 10, b"{" * 9)
    with pytest.raises(UserError, match=r"/img_emb_0\.npy cannot be read"):
        Pairs("embeddings", "given", "all")


def test_parts_without_rows_and_of_another_size(laion):
    np.testing.assert_array_equal([array[:] for array in Arrays("laion").embeddings("all")], laion)
    np.save("laion/img_emb/img_emb_2.npy", np.ones((6, 9), np.float32))
    with pytest.raises(UserError, match=r"laion: img_emb_2\.npy has rows of size 9, the first part of 8: give"):
        Arrays("laion")
    np.save("laion/img_emb/img_emb_2.npy", np.ones((6, 8), np.int64))
    with pytest.raises(UserError, match=r"laion: img_emb_2\.npy must hold one .* not int64 of shape \(6, 8\)"):
        Arrays("laion")
    for number in (0, 2):
        for kind in ("img_emb", "text_emb"):
            os.unlink(f"laion/{kind}/{kind}_{number}.npy")
    with pytest.raises(UserError, match="laion: its parts have no rows"):
        Arrays("laion")


def test_img2datasets_folder_is_read_in_place(tmp_path):
    """Shards of samples, beside which img2dataset writes a table and its statistics."""
    import io
    import json
    import tarfile

    import PIL.Image

    from datasets.shards import Shards

    pytest.importorskip("webdataset")
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard:05d}.tar", "w") as tar:
            for number in range(3):
                pixels = io.BytesIO()
                PIL.Image.new("RGB", (4, 4)).save(pixels, "JPEG")
                key = f"{shard:05d}{number:04d}"
                content = {"jpg": pixels.getvalue(), "txt": b"a square", "json": json.dumps({"key": key}).encode()}
                for suffix, data in content.items():
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        (tmp_path / f"{shard:05d}.parquet").write_bytes(b"a table")
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")
    source = Shards(tmp_path)
    images = source.images("all")
    assert len(images) == len(source.captions("all")) == 6
    with source.open(images[4]) as image:
        assert image.size == (4, 4)
