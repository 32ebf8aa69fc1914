"""What a cache must survive: kills at any moment, several processes, and any files in a folder of images."""

import dataclasses
import io
import json
import multiprocessing
import os
import random
import select
import shutil
import signal
import socket
import struct
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from check_method import SMALL_WORLD
from conftest import forked_ranks, handlers_kept

import cache_embeddings
from datasets import blocks, ranks
from datasets.embeddings import Pairs
from datasets.ranks import Ranks
from models.backbones.openclip import Backbone
from utils.config import load_backbone
from utils.errors import UserError

SHAPES = ["--dataset", "shapes", "--quiet", "--device", "cpu", "--splits", "val", "--set", *SMALL_WORLD]
SMALL_BATCHES = [*SHAPES, "encoder.batch_size=8"]


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def empty_world(small_world, tmp_path, monkeypatch):
    """A working folder with the small world's drawings but without its caches."""
    (tmp_path / "data").symlink_to(small_world / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.long
def test_ten_kills_at_random_moments_leave_no_trace(empty_world, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 8)
    monkeypatch.setattr(blocks, "TEXTS", 32)
    folder = empty_world / "embeddings/shapes/shapes-tiny/val"
    half = ["encoder.precision=bfloat16"]  # in which a batch of another composition would give other bytes
    command = [*SMALL_BATCHES, *half, "--features", "pooled", "--workers", "1"]
    loaded = Backbone(dataclasses.replace(load_backbone("shapes-tiny"), precision="bfloat16", batch_size=8))
    monkeypatch.setattr(cache_embeddings, "make_backbone", lambda *args: loaded)
    started = time.monotonic()
    cache_embeddings.main(command)
    seconds, expected = time.monotonic() - started, content(folder)
    shutil.rmtree(folder)
    chance, moments = random.Random(0), []
    fork = multiprocessing.get_context("fork")  # a new process without seconds of imports
    while len(moments) < 10:
        process = fork.Process(target=cache_embeddings.main, args=(command,))
        started = time.monotonic()
        process.start()
        process.join(chance.uniform(0, seconds))
        process.kill()
        process.join()
        if process.exitcode == 0:  # it finished before the kill, faster than the first run
            seconds = min(seconds, time.monotonic() - started)
            shutil.rmtree(folder)
            continue
        assert process.exitcode == -signal.SIGKILL
        moments.append(len(list(folder.glob("unfinished/*.npz"))))
    assert len(set(moments)) > 3, moments  # they were killed at different stages
    cache_embeddings.main(command)
    assert content(folder) == expected


def torchrun(ranks, main, *arguments):
    """Call `main` in processes that torchrun's own agent starts: forked, without the seconds in which each imports."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=ranks, start_method="fork",
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0,
    )  # fmt: skip
    with handlers_kept(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):  # which torch replaces
        elastic_launch(config, main)(*arguments)


@pytest.mark.long
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
def test_two_ranks_write_the_bytes_of_one(empty_world, capfd):
    folder = empty_world / "embeddings/shapes/shapes-tiny/val"
    command = [*SHAPES, "encoder.batch_size=25", "data.options.val_images=200"]
    cache_embeddings.main(command)
    alone = content(folder)
    shutil.rmtree(folder)
    capfd.readouterr()
    # An unreadable image, which only one rank reads, ends both with one sentence.
    picture = sorted(empty_world.glob("data/shapes/*96px/val/*.jpg"))[190]
    good = picture.read_bytes()
    picture.write_bytes(b"")
    (code, _, error), (other_code, _, other_error) = sorted(
        forked_ranks(2, cache_embeddings.main, command), reverse=True
    )
    picture.write_bytes(good)
    assert (code, other_code) == (2, 1)
    assert "000190.jpg cannot be read" in error and error.count("\n") == 1 and not other_error
    assert not (folder / "meta.json").exists() and list(folder.glob("unfinished/*.npz"))
    torchrun(2, cache_embeddings.main, command)
    assert capfd.readouterr().out.count("200 images, 1,000 captions") == 1
    assert content(folder) == alone
    (code, first, _), (other_code, second, _) = forked_ranks(2, cache_embeddings.main, command)
    assert code == other_code == 0 and (first + second).count("already there") == 1


def test_processes_with_different_lists_are_refused(empty_world, refusal, monkeypatch):
    """If two machines see different states of a folder, rows would belong to wrong images."""
    monkeypatch.setattr(
        Ranks, "broadcast", lambda self, value: value | {"listing_fingerprint": "of another list"} if value else value
    )
    assert "lists other images and captions than the first" in refusal(cache_embeddings.main, *SHAPES)
    assert not list(empty_world.glob("embeddings/**/*.np*"))


def test_waiting_for_processes_that_never_come_ends(monkeypatch, capsys):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in (("WORLD_SIZE", 2), ("RANK", 0), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", port)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(ranks, "NOTICE", 0.1)
    monkeypatch.setattr(ranks, "MEETING", 1)
    with pytest.raises(UserError, match=r"WORLD_SIZE is 2, but the processes cannot find each other \(.*1/2.*\):"):
        Ranks()
    assert "waiting for 2 processes, as WORLD_SIZE says" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "limits"),
    [
        ("WORLD_SIZE", "x", "from 1 to 2,147,483,647"),
        ("WORLD_SIZE", "0", "from 1 to 2,147,483,647"),
        ("WORLD_SIZE", "", "from 1 to 2,147,483,647"),
        ("RANK", "1", "0"),
        ("LOCAL_WORLD_SIZE", "0", "1"),
        ("LOCAL_RANK", "-1", "from 0 to 65,535"),
    ],
)
def test_numbers_of_processes_that_cannot_be_are_named(monkeypatch, name, value, limits):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"^{name} must be {limits}, not '{value}': start with torchrun, or unset it"):
        Ranks()


def test_a_launcher_need_not_count_the_processes_of_a_machine(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert Ranks().local == 3


def test_waiting_for_the_work_of_another_process_ends(monkeypatch):
    one = Ranks()
    one.world = 2

    def lost(*args, **options):
        raise RuntimeError("Connection closed by peer, or timed out")

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lost)
    with pytest.raises(SystemExit) as stop:  # another has failed, and says why
        one.broadcast(None)
    assert stop.value.code == 1
    monkeypatch.setattr(ranks, "WAIT", 0)
    with pytest.raises(UserError, match=r"process 0 of 2 has waited 0 hours for the others: see what they do"):
        one.broadcast(None)


class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, row):
        time.sleep(2)


def test_waiting_for_a_picture_ends():
    loader = torch.utils.data.DataLoader(Slow(), num_workers=1, timeout=1, multiprocessing_context="fork")
    with pytest.raises(UserError, match=r"images does not answer \(DataLoader timed out after 1 seconds\):"):
        next(blocks._decoded(loader))


class Large(Slow):
    def __len__(self):
        return 8

    def __getitem__(self, row):
        return np.zeros(2**20)


def decode_for_ever():
    options = {
        "num_workers": 1,
        "batch_size": None,
        "collate_fn": np.asarray,
        "worker_init_fn": blocks.end_with_parent,
    }
    batches = iter(torch.utils.data.DataLoader(Large(), **options, multiprocessing_context="fork"))
    next(batches)
    time.sleep(60)


def test_workers_end_when_the_script_is_killed():
    """Even one that waits for its batch, which is larger than a pipe, to be taken."""
    ended, alive = os.pipe()  # which every process keeps open for writing until it ends
    process = multiprocessing.get_context("fork").Process(target=decode_for_ever)
    process.start()
    os.close(alive)
    time.sleep(1)
    process.kill()
    process.join()
    assert select.select([ended], [], [], 20)[0] and os.read(ended, 1) == b""
    os.close(ended)


def test_pictures_need_no_shared_memory_and_no_socket(tmp_path, monkeypatch, capsys):
    """In a TMPDIR of more than 100 characters no socket can be made, without which torch sends no tensor."""
    monkeypatch.chdir(tmp_path)
    for row in range(6):
        PIL.Image.new("RGB", (20, 20), (40 * row, 0, 0)).save(f"{row}.png")
    Path("mine.csv").write_text("image,caption\n" + "".join(f"{row}.png,caption {row}\n" for row in range(6)))
    (tmp_path / ("x" * 120)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 120)))
    monkeypatch.delitem(multiprocessing.process.current_process()._config, "tempdir", raising=False)
    monkeypatch.setattr(blocks, "PATIENCE", 20)
    command = ["--dataset", "pairs", "--root", "mine.csv", "--backbone", "shapes-tiny", "--splits", "all", "--quiet"]
    cache_embeddings.main([*command, "--workers", "1", "--set", "encoder.batch_size=4"])
    assert "6 images, 6 captions" in capsys.readouterr().out


def png(width, height, data=b"", *chunks):
    """Make a PNG with a header of this size, whatever its data."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def hostile_images():
    """Return {file name: (content, the expected picture, or None if the file is unreadable)}."""
    rng = np.random.default_rng(0)
    photo = PIL.Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize((80, 60), PIL.Image.BICUBIC)
    gray, rgba = photo.convert("L"), photo.copy()
    rgba.putalpha(gray)
    deep = np.asarray(gray, dtype=np.uint16) * 257
    jpeg, plain = encoded(photo, "JPEG"), encoded(photo, "PNG")
    sideways = PIL.Image.Exif()
    sideways[0x0112] = 6
    turned, stripe = photo.transpose(PIL.Image.Transpose.ROTATE_90), PIL.Image.new("RGB", (20000, 1), (9, 99, 199))
    other = PIL.ImageOps.invert(photo)
    bomb = zlib.compress(b"\0" * 2**20)
    megabytes = zlib.compress(b"a" * 2**21)

    def with_chunk(kind, body):
        """A PNG of the photo with one more chunk after its header."""
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return plain[:33] + struct.pack(">I", len(body)) + kind + body + checksum + plain[33:]

    read = {
        "plain.jpg": (jpeg, photo),
        "progressive.jpg": (encoded(photo, "JPEG", progressive=True), photo),
        "gray.jpg": (encoded(gray, "JPEG"), gray),
        "cmyk.jpg": (encoded(photo.convert("CMYK"), "JPEG"), photo),
        "cmyk.tif": (encoded(photo.convert("CMYK"), "TIFF"), photo),
        "palette.png": (encoded(photo.quantize(256), "PNG"), photo),
        "palette with transparency.png": (encoded(photo.quantize(256), "PNG", transparency=3), photo),
        "one bit.png": (encoded(gray.convert("1"), "PNG"), gray.convert("1")),
        "gray and alpha.png": (encoded(rgba.convert("LA"), "PNG"), gray),
        "alpha.png": (encoded(rgba, "PNG"), photo),
        "16 bit.png": (encoded(PIL.Image.fromarray(deep), "PNG"), gray),
        "16 bit.tif": (encoded(PIL.Image.fromarray(deep), "TIFF"), gray),
        "sideways.jpg": (encoded(turned, "JPEG", exif=sideways), photo),
        "damaged exif.jpg": (encoded(photo, "JPEG", exif=b"Exif\0\0nonsense"), photo),
        "animated.gif": (encoded(photo.quantize(256), "GIF", save_all=True, append_images=[other]), photo),
        "animated.webp": (encoded(photo, "WEBP", save_all=True, append_images=[other], quality=95), photo),
        "still.webp": (encoded(photo, "WEBP", quality=95), photo),
        "bitmap.bmp": (encoded(photo, "BMP"), photo),
        "several pages.tif": (encoded(photo, "TIFF", save_all=True, append_images=[other]), photo),
        "portable.ppm": (encoded(photo, "PPM"), photo),
        "a png by the name of.jpg": (plain, photo),
        "no suffix": (jpeg, photo),
        "名前 \N{CAT FACE} 'quoted', \"twice\".jpg": (jpeg, photo),
        os.fsdecode(b"caf\xe9.jpg"): (jpeg, photo),
        "one pixel.png": (encoded(photo.resize((1, 1)), "PNG"), photo.resize((1, 1))),
        "thin.png": (encoded(stripe, "PNG"), stripe.crop((0, 0, 1, 1))),
        "tall.png": (encoded(stripe.rotate(90, expand=True), "PNG"), stripe.crop((0, 0, 1, 1))),
        "long text.png": (with_chunk(b"zTXt", b"Comment\0\0" + megabytes), photo),
        "long unicode text.png": (with_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + megabytes), photo),
        "long profile.png": (with_chunk(b"iCCP", b"profile\0\0" + megabytes), photo),
        "short chunk.png": (with_chunk(b"gAMA", b"\0"), photo if PIL.__version__ >= "13" else None),
        "no end.png": (plain[:-12], photo),
        "half an end.png": (plain[:-5], photo),
        "no end, long text.png": (with_chunk(b"zTXt", b"Comment\0\0" + megabytes)[:-12], photo),
        "no end.jpg": (jpeg[:-2], photo),
        "half an end.jpg": (jpeg[:-1], photo),
        "damaged profile.jpg": (encoded(photo, "JPEG", icc_profile=b"nonsense"), photo),
    }
    broken = {
        "zero bytes.jpg": b"",
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "header alone.jpg": jpeg[:20],
        "two bytes short.jpg": jpeg[:-4],
        "maybe a scan short.jpg": encoded(photo, "JPEG", progressive=True)[:-2],
        "checksum short.png": plain[:-15],
        "truncated.png": plain[: len(plain) // 2],
        "damaged.png": plain[:60] + b"\0\0\0\0" + plain[64:],
        "truncated.gif": encoded(photo.quantize(256), "GIF")[:300],
        "a text by the name of.jpg": b"not a picture at all\n",
        "a page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        "film.mp4": b"\0\0\0\x18ftypmp42" + b"\0" * 100,
        "phone.heic": b"\0\0\0\x18ftypheic" + b"\0" * 100,
        "gigantic.png": png(60000, 60000),
        "empty sides.png": png(0, 0),
        "text bomb.png": png(8, 8, b"", struct.pack(">I", 1) + b"zTXt") + bomb,
        "real numbers.tif": encoded(PIL.Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)), "TIFF"),
    }
    return read | {name: (data, None) for name, data in broken.items()}


CAPTIONS = {
    "ten thousand words": "word " * 10_000,
    "one long word": "a" * 50_000,
    "cats and families": "\N{CAT FACE}\u200d\N{CAT FACE} \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "from right to left": "\u05d7\u05ea\u05d5\u05dc \u202eabc\u202c",
    "other line ends": "one\u2028two\u0085three\u001cfour\u000bfive",
    "a null": "be\0tween",
    "controls": "\a\b\x1b[31mred\x7f",
    "accents": "e" + "\u0301" * 500,
    "punctuation": "!?...,,,;;;---",
    "nothing seen": "\u200b\u200d\ufeff",
    "markup": "<script>alert(1)</script>&amp;&lt;",
    "words of the tokenizer": "<start_of_text> a cat <end_of_text> a dog <|endoftext|>",
    "quotes": 'he said "no", \\n \' "',
    "private": "\ue000\U0010fffd",
    "numbers": "12345678901234567890 " * 30,
    "Chinese": "一只黑猫坐在红色的沙发上" * 20,
}
BAD_CAPTIONS = {"nothing": "", "blanks": " \t\n\u00a0\u2003 ", "half a pair": "cat \ud83d", "other half": "\udc31 cat"}


def shown(name):
    """Name of a file in reports; the name itself may be invalid Unicode."""
    return name.encode("utf-8", "backslashreplace").decode()


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """Write hostile files and captions with a pairs.jsonl that lists them; returns files and (file, caption) rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    files = hostile_images()
    for name, (data, _) in files.items():
        (tmp_path / "images" / name).write_bytes(data)
    (tmp_path / "images" / "a folder.jpg").mkdir()
    (tmp_path / "images" / "leads nowhere.jpg").symlink_to(tmp_path / "nowhere.jpg")
    absent = ["a folder.jpg", "leads nowhere.jpg", "never there.jpg"]
    rows = [(name, f"a picture called {shown(name)}") for name in (*files, *absent)]
    rows += [("plain.jpg", caption) for caption in CAPTIONS.values()]
    rows += [("still.webp", caption) for caption in BAD_CAPTIONS.values()]
    random.Random(0).shuffle(rows)
    lines = [json.dumps({"image": name, "caption": caption}) for name, caption in rows]
    (tmp_path / "images" / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return files, rows


HOSTILE = ["--dataset", "pairs", "--root", "images/pairs.jsonl", "--backbone", "shapes-tiny", "--splits", "all"]


def test_hostile_files_lose_and_shift_no_other_row(hostile, capsys):
    files, rows = hostile
    assert len(files) + len(CAPTIONS) + len(BAD_CAPTIONS) >= 60
    cache_embeddings.main([*HOSTILE, "--on-error", "skip", "--quiet", "--workers", "2"])
    output = capsys.readouterr().out
    pairs, backbone = Pairs("pairs", "shapes-tiny", "all"), Backbone(load_backbone("shapes-tiny"))
    name_of = {shown(name): name for name in files}
    names = [name_of[place.rsplit("/", 1)[-1]] for place in pairs.items["image"]]
    assert sorted(names) == sorted(name for name, (_, picture) in files.items() if picture is not None)
    for name, row in zip(names, pairs.image):
        expected = backbone.encode_images(backbone.transform(files[name][1].convert("RGB"))[None])[0]
        cosine = torch.cosine_similarity(expected, torch.tensor(row).float(), dim=0)
        assert cosine > 0.99, (name, cosine)
    # Every valid row is kept, and each caption has its image and its embedding.
    kept = [(name, caption) for name, caption in rows if name in names and caption not in BAD_CAPTIONS.values()]
    cached = [(names[image], text) for image, text in zip(pairs.image_of_text, pairs.items["text"])]
    folded = [(name, " ".join(caption.split())) for name, caption in kept]
    assert sorted((name, " ".join(text.split())) for name, text in cached) == sorted(folded)
    for text, row in zip(pairs.items["text"], pairs.text):
        torch.testing.assert_close(backbone.encode_texts([text])[0], torch.tensor(row).float(), rtol=5e-3, atol=5e-3)
    lines = [json.loads(line) for line in (pairs.folder / "skipped.jsonl").read_text().splitlines()]
    broken = sum(picture is None for _, picture in files.values())
    assert len(lines) == pairs.meta["skipped"] == broken + 3 + len(BAD_CAPTIONS) and f"{len(lines)} left out" in output
    skipped = {line["path"].rsplit("/", 1)[-1]: line["reason"] for line in lines if "image_id" in line}
    assert skipped.keys() == {name for name, (_, picture) in files.items() if picture is None} | {
        "a folder.jpg", "leads nowhere.jpg", "never there.jpg",
    }  # fmt: skip
    assert all(reason and "\n" not in reason for reason in skipped.values())
    assert skipped["never there.jpg"] == "absent"
    assert skipped["zero bytes.jpg"] == "it is not an image that Pillow can read"
    assert f"{pairs.meta['captions_cut']} cut to the length that the model reads" in output
    assert pairs.meta["captions_cut"] == sum(not backbone.reads_whole(text) for text in pairs.items["text"]) >= 4


def test_hostile_files_stop_it_one_by_one(hostile, refusal, tmp_path, monkeypatch):
    """The script names one bad row after the other, until all are removed and the cache is complete."""
    loaded = Backbone(load_backbone("shapes-tiny"))
    monkeypatch.setattr(cache_embeddings, "make_backbone", lambda *args: loaded)
    files, rows = hostile
    file, removed = tmp_path / "images" / "pairs.jsonl", []
    error = refusal(cache_embeddings.main, *HOSTILE, "--quiet")
    assert "3 of the" in error and "absent" in error
    rows = [(name, caption) for name, caption in rows if name in files]
    bad = dict(enumerate(caption for _, caption in rows if caption in BAD_CAPTIONS.values()))
    for _ in range(len(files) + len(bad)):
        lines = [json.dumps({"image": name, "caption": caption}) for name, caption in rows]
        file.write_text("\n".join(lines) + "\n")
        try:
            cache_embeddings.main([*HOSTILE, "--quiet"])
            break
        except SystemExit:
            pass
        row = next((row for row, (name, caption) in enumerate(rows) if caption in BAD_CAPTIONS.values()), None)
        if row is None:
            row = next(row for row, (name, _) in enumerate(rows) if files[name][1] is None)
        removed.append(rows.pop(row))
    assert len(removed) == len(BAD_CAPTIONS) + sum(picture is None for _, picture in files.values())
    pairs = Pairs("pairs", "shapes-tiny", "all")
    assert pairs.meta["skipped"] == 0 and len(pairs.text) == len(rows)
