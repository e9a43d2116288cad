"""Stored teachers: runs from a cache are those with the teacher, and a cache of anything else is refused."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from faulty_server import faulty_server

import kdkernels as kd
from kdkernels.cli import main
from kdkernels.sources.sampled import draw
from kdkernels.teachers import stored
from kdkernels.training import InputError, caching, serving, train
from kdkernels.training.inputs import read_inputs
from kdkernels.training.run.metrics import read_metrics

from .conftest import GKD, final_weights
from .test_placement import TWO
from .test_processes import finish, start, untimed
from .test_served_teachers import BF16, check_same, kept

OFF = (*GKD, "rollout.student_fraction=0", "train.steps=8")


@pytest.fixture
def made(load, teacher_set):
    """made(*overrides, top_k=None, sampled=False): writes the cache; the overrides of runs that read it."""

    def made(*overrides, top_k=None, sampled=False, name="cache"):
        more = [*OFF, *overrides]
        cache = f"teacher.cache={Path(load().run.output).parent / name}"
        made.told = caching.cache(load(*more, teacher_set, cache), top_k, sampled)
        return [*more, cache]

    return made


def root_of(overrides) -> Path:
    return Path(overrides[-1].partition("=")[2])


# ---- runs from a cache ----


@pytest.mark.parametrize("options", [(), pytest.param(BF16, marks=pytest.mark.slow)], ids=["float32", "bfloat16"])
def test_a_run_from_stored_hidden_states_is_that_with_the_teacher(load, teacher_set, made, options, capsys):
    """Its first epoch, in micro-batches of several responses, with padding, and what is evaluated."""
    root = Path(load().run.output).parent
    options = (*options, f"evaluation.data={root}/test.jsonl", 'evaluation.metrics=["kl"]', "evaluation.batch_size=3")
    expected = kept(train(load(*OFF, *options, teacher_set)))
    cached = [one for one in made(*options) if not one.startswith("teacher.dtype")]
    found = kept(train(load(*cached, f"run.output={root}/from-cache")))
    check_same(found, expected)
    assert found[0][0]["evaluation/kl"] > 0 and len(found[0]) == 9
    assert "16 numbers in bfloat16, 32 bytes a token" in made.told + capsys.readouterr().out or not options[:-3]


@pytest.mark.slow
def test_every_epoch_is_to_the_bit_in_micro_batches_of_one(load, teacher_set, made):
    """And up to rounding otherwise."""
    root = Path(load().run.output).parent
    more = ("train.micro_batch_size=1", "train.steps=20", "data.by_length=true")
    expected = kept(train(load(*OFF, *more, teacher_set)))
    check_same(kept(train(load(*made(*more), f"run.output={root}/again"))), expected)
    more = ("train.steps=20",)
    losses = [line["loss"] for line in kept(train(load(*OFF, *more, teacher_set, f"run.output={root}/two")))[0]]
    found = kept(train(load(*made(*more, name="of-two"), f"run.output={root}/two-again")))[0]
    torch.testing.assert_close([line["loss"] for line in found], losses, rtol=1e-4, atol=1e-6)


def test_stored_top_k_of_all_entries_is_the_teacher_up_to_sixteen_bits(load, teacher_set, made):
    root = Path(load().run.output).parent
    expected = kept(train(load(*OFF, teacher_set)))[0]
    entries = json.loads((root_of(made(name="hidden")) / stored.MANIFEST).read_text())["vocabulary"]
    for k, tolerance in ((entries, 1e-3), (entries - 2, 0.05)):
        found = kept(train(load(*made(top_k=k, name=f"k{k}"), f"run.output={root}/run-k{k}")))[0]
        for line, wanted in zip(found, expected, strict=True):
            assert line["loss"] == pytest.approx(wanted["loss"], rel=tolerance) and line["loss"] > 0
        assert f"{4 * k + 2} bytes a token" in str(stored.Cache(root / f"k{k}", "").teacher(entries, "cpu"))


def test_the_tail_is_that_of_the_teacher():
    """Not what rounding leaves of sixteen-bit log-probabilities."""
    torch.manual_seed(0)
    log_p = (6 * torch.randn(200, 300, dtype=torch.float64)).log_softmax(-1)
    top, ids = log_p.topk(32)
    for vocabulary, kind, size in ((300, torch.uint16, 4), (2**17 + 500, torch.uint8, 5)):
        own = ids + (vocabulary - 300)  # every byte of an id counts
        rows = stored.packed_top_k(own, top, vocabulary)
        assert rows["ids"].dtype == kind and stored.bytes_per_token(rows) == size * 32 + 2
        found, log_probs = stored.unpacked_top_k(rows)
        rest, wanted = -torch.expm1(log_probs.double().logsumexp(-1)), 1 - top.exp().sum(-1)
        assert torch.equal(found.long(), own) and wanted.min() < 1e-4
        assert ((rest - wanted).abs() <= 5e-3 * wanted + 3e-7).all()
        assert (log_probs.double() - top).abs().max() < 0.01
    with pytest.raises(ValueError, match=r"vocabulary: expected at most 16777216 entries, got 16777217"):
        stored.packed_top_k(ids, top, 2**24 + 1)
    whole = stored.packed_top_k(ids, log_p.topk(32).values.log_softmax(-1), 32)
    assert (stored.unpacked_top_k(whole)[1].exp().sum(-1) - 1).abs().max() < 1e-6


def test_stored_draws_are_the_teacher_up_to_their_number(load, teacher_set, made):
    """All entries up to sixteen bits; a few of them in the mean, where as many of the likeliest lie below."""
    root, loss = Path(load().run.output).parent, {}

    def mean_loss(*overrides) -> float:
        lines = kept(train(load(*overrides, "optimizer.lr=1e-12")))[0]
        return sum(line["loss"] for line in lines) / len(lines)

    loss["whole"] = mean_loss(*OFF, teacher_set)
    entries = json.loads((root_of(made(name="hidden")) / stored.MANIFEST).read_text())["vocabulary"]
    for k, sampled in ((entries, True), (4, True), (4, False)):
        name = f"{k}-{sampled}"
        overrides = made(top_k=k, sampled=sampled, name=name)
        loss[k, sampled] = mean_loss(*overrides, f"run.output={root}/run-{name}")
    assert loss[entries, True] == pytest.approx(loss["whole"], rel=1e-3)
    off = {sampled: loss[4, sampled] - loss["whole"] for sampled in (True, False)}
    assert off[False] < 0 and abs(off[True]) < 0.5 * abs(off[False]), loss
    shown = str(stored.Cache(root / "4-True", "").teacher(entries, "cpu"))
    assert f"4 sampled of {entries} entries, 18 bytes a token" in shown + made.told


def test_draws_are_the_same_again_and_keep_what_they_stand_for(load, made):
    """A sample's draws depend on its id alone, so that a cache that was interrupted is finished as it would have been;
    sixteen bits and their reading leave the masses."""
    first, again = (
        stored.Cache(root_of(made(f"run.seed={seed}", top_k=5, sampled=True, name=f"seed-{seed}")), "")
        for seed in (1, 2)
    )
    assert first.places.keys() == again.places.keys()
    for one in first.places:
        rows, others = first.rows(one), again.rows(one)
        assert torch.equal(rows["ids"].int(), others["ids"].int()) and torch.equal(rows["tail"], others["tail"])
    generator = torch.Generator().manual_seed(0)
    z = 4 * torch.randn(300, 200, dtype=torch.float64, generator=generator)
    drawn = kd.TopK.sample(kd.Logits(z), 24, generator=generator)
    rows = stored.packed_top_k(drawn.indices, drawn.log_probs, 200, sampled=True)
    assert stored.bytes_per_token(rows) == 4 * 24 + 2
    ids, log_probs = stored.unpacked_top_k(rows, sampled=True)
    assert torch.equal(ids.long(), drawn.indices) and (log_probs.double() - drawn.log_probs).abs().max() < 0.02
    masses, wanted = (kd.reference.sampled_masses(one.double()) for one in (log_probs, drawn.log_probs))
    torch.testing.assert_close(masses, wanted, rtol=5e-3, atol=1e-5)
    torch.testing.assert_close(masses.sum(1), torch.ones(300, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [5, 33])
@pytest.mark.parametrize("certain", [0.0, 0.5])
def test_sixteen_bits_make_no_drawn_entry_certain(k, certain):
    """Of a word just below tau, whose stored number lies above it."""
    p = torch.full((1, 3000), 0.0, dtype=torch.float64)
    p[0, 0], left, c = certain, 1 - certain, int(certain > 0)
    p[0, c] = 0.9999 * left / k
    p[0, c + 1 :] = (left - p[0, c]) / (2999 - c)
    ids, log_p = draw(kd.Logits(p.log()), torch.arange(1), k + c, torch.tensor([0.01], dtype=torch.float64))
    found = stored.unpacked_top_k(stored.packed_top_k(ids, log_p, 3000, sampled=True), sampled=True)[1].double()
    assert c in ids and (found - log_p).abs().max() < 0.01
    z_s = torch.zeros(1, 3000, dtype=torch.float64)
    value, wanted = (kd.reference.sampled_divergence(z_s, ids, one, kd.JSD(0.5)) for one in (found, log_p))
    torch.testing.assert_close(value, wanted, rtol=0, atol=2e-3)


# ---- writing ----


def test_what_is_written_is_what_is_said(made, capsys):
    overrides = made()
    root, index = root_of(overrides), json.loads((root_of(overrides) / stored.INDEX).read_text())["parts"]
    tokens = sum(one["tokens"] for one in index.values())
    assert sum(one["samples"] for one in index.values()) == 32 and tokens > 100
    assert f"32 samples, {tokens} tokens" in made.told
    cache = stored.Cache(root, "")
    rows = [cache.rows(one)["hidden"] for one in cache.places]
    assert sum(map(len, rows)) == tokens and all(one.shape[1] == 16 for one in rows)
    size = sum(one["bytes"] for one in index.values())
    assert 0 <= size - tokens * 64 < 32 * 64 + 200, "ids and checksums beside 64 bytes a token"


@pytest.mark.parametrize("kind", [{}, {"top_k": 5, "sampled": True}], ids=["hidden", "sampled"])
def test_a_cache_that_was_interrupted_is_finished(load, made, teacher_set, monkeypatch, kind):
    monkeypatch.setattr(caching, "PART_BYTES", 500 if not kind else 170)
    whole = stored.Cache(root_of(made(name="whole", **kind)), "")
    written, stop = caching.write_bytes, [5]

    def killed(path, contents):
        stop[0] -= 1
        if stop[0] < 0:
            path.with_name(f"unfinished-{path.name}").write_bytes(contents[:50])
            raise KeyboardInterrupt
        written(path, contents)

    monkeypatch.setattr(caching, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        made(name="cut", **kind)
    overrides = [*OFF, f"teacher.cache={whole.root.parent / 'cut'}"]
    with pytest.raises(InputError, match="not finished: kdkernels teacher-cache goes on"):
        train(load(*overrides))
    monkeypatch.setattr(caching, "write_bytes", written)
    parts = {path.name: path.stat().st_mtime_ns for path in root_of(overrides).glob("part-*")}
    assert len(parts) == 4 + bool(kind), "an lm_head beside those of hidden states"
    again = stored.Cache(root_of(made(name="cut", **kind)), "")
    assert again.places.keys() == whole.places.keys() and len(list(again.root.glob("unfinished-*"))) == 0
    for one in whole.places:
        rows, wanted = again.rows(one), whole.rows(one)
        assert all(torch.equal(rows[name].double(), wanted[name].double()) for name in wanted), one
    assert all((again.root / name).stat().st_mtime_ns == when for name, when in parts.items()), "none is made twice"


# ---- refused ----


def spoil(root: Path, case: str) -> None:
    manifest, index = (root / name for name in (stored.MANIFEST, stored.INDEX))
    part = next(root.glob("part-*"))
    contents = part.read_bytes()
    said = json.loads(manifest.read_text())
    if case == "part":
        part.unlink()
    elif case == "cut":
        part.write_bytes(contents[:-5])
    elif case == "other bytes":
        part.write_bytes(contents[:-2] + bytes([contents[-2] ^ 1, contents[-1]]))
    elif case == "no tensors":
        part.write_bytes(b"x" * len(contents))
    elif case == "version":
        manifest.write_text(json.dumps(said | {"format": "kdkernels teacher cache 0"}))
    elif case == "kind":
        manifest.write_text(json.dumps(said | {"kind": "rumours"}))
    elif case == "tokenizer":
        manifest.write_text(json.dumps(said | {"tokenizer": "0" * 64}))
    elif case == "manifest":
        manifest.write_text("{")
    elif case == "index":
        index.unlink()
    elif case == "lm_head":
        (root / stored.HEAD).write_bytes(b"")
    elif case == "another lm_head":
        head = root / stored.HEAD
        head.write_bytes(head.read_bytes()[:-2] + b"<<")
    elif case == "none":
        shutil.rmtree(root)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("part", r"expected \d+ bytes, got none"),
        ("cut", r"part-0000-000000.safetensors: expected \d+ bytes, got \d+ bytes"),
        ("no tensors", "is damaged or cut"),
        ("other bytes", "the bytes of sample .* are not those that were written"),
        ("version", "expected a cache of the format 'kdkernels teacher cache 1', got 'kdkernels teacher cache 0'"),
        ("kind", "expected a cache of the kind hidden, top-k, sampled, got 'rumours'"),
        ("tokenizer", "was made with another tokenizer \\(sha256 000000000000, not "),
        ("manifest", "is no cache of a teacher: manifest.json"),
        ("index", "is not finished"),
        ("lm_head", "head.safetensors cannot be used"),
        ("another lm_head", "head.safetensors cannot be used: it is cut, changed or another cache's"),
        ("none", "is no cache of a teacher"),
    ],
)
def test_caches_that_are_refused(load, made, case, said):
    overrides = made()
    spoil(root_of(overrides), case)
    with pytest.raises(InputError, match=r"\[teacher\] cache: .*" + said):
        train(load(*overrides))
    metrics = Path(load().run.output, "metrics.jsonl")
    steps = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    assert steps < 8 if case == "other bytes" else steps == 0, "nothing was trained on it"


def test_a_cache_of_other_data_or_of_another_teacher_is_refused(load, made, teacher_set, tmp_path):
    overrides, data = made(), Path(load().data.train)
    other = tmp_path / "other"
    shutil.copytree(teacher_set.partition("=")[2], other)
    config = json.loads((other / "generation_config.json").read_text())
    (other / "generation_config.json").write_text(json.dumps(config | {"x": 1}))
    with pytest.raises(InputError, match=r"another teacher: \[teacher\] path .*generation_config.json changed"):
        train(load(*overrides, f"teacher.path={other}"))
    with pytest.raises(InputError, match=r"another teacher: \[teacher\] dtype: float32 -> bfloat16"):
        train(load(*overrides, teacher_set, "teacher.dtype=bfloat16"))
    lines = data.read_text().splitlines()
    data.write_text("\n".join([*lines[:9], '{"question": "7+7=", "answer": "14."}', *lines[10:]]) + "\n")
    with pytest.raises(
        InputError, match=r"has no sample of .*train.jsonl, line 10: .*data of sha256 [0-9a-f]{64}, and"
    ):
        train(load(*overrides))
    with pytest.raises(InputError, match=r"was made from something else: \[data\] train: its contents changed"):
        made()
    data.write_text("\n".join(lines) + "\n")
    assert train(load(*overrides, teacher_set)).final.is_dir()


def test_a_cache_that_does_not_fit_the_recipe_is_refused(load, made, teacher_set):
    of_words = made(top_k=4, name="words")
    for more, said in (
        (["objective.name=TSDKD", "objective.k=4"], r"\[objective\] TSDKD needs the teacher's probability of every"),
        ([f"evaluation.data={load().data.train}", 'evaluation.metrics=["kl"]'], '"agreement" needs the teacher'),
        (["objective.temperature=2.0"], r"\[objective\] temperature: expected 1 with the stored words of .*, got 2"),
        (["rollout.student_fraction=0.5"], r"\[rollout\] student_fraction: expected 0, since \[teacher\] cache"),
    ):
        with pytest.raises(InputError, match=said):
            train(load(*of_words, *more))
    with pytest.raises(InputError, match=r"--top-k: expected at most .*, the tokenizer's vocabulary, got 99"):
        made(top_k=99, name="many")
    with pytest.raises(InputError, match=r"made from something else: kind: top-k -> hidden; k: 4 -> None"):
        made(name="words")
    with pytest.raises(InputError, match=r"made from something else: k: 4 -> 5"):
        made(top_k=5, name="words")
    drawn = made(top_k=4, sampled=True, name="drawn")
    with pytest.raises(InputError, match=r"got the reverse KL, .*drawn has 4 sampled of \d+ entries of each token"):
        train(load(*drawn, "objective.beta=1.0"))
    with pytest.raises(InputError, match=r"temperature: expected 1 with .*drawn, which were drawn at 1, got 2"):
        train(load(*drawn, "objective.temperature=2.0"))
    with pytest.raises(InputError, match=r"made from something else: kind: sampled -> top-k"):
        made(top_k=4, name="drawn")
    (root_of(of_words).parent / "mine").mkdir()
    (root_of(of_words).parent / "mine" / "notes.txt").touch()
    with pytest.raises(InputError, match="is not empty, and what it holds is no cache"):
        made(name="mine")


def test_a_resumed_run_finds_the_same_cache(load, made):
    overrides = [*made(), "checkpoint.every=1"]
    train(load(*overrides))
    index = root_of(overrides[:-1]) / stored.INDEX
    index.write_text(index.read_text() + " ")
    with pytest.raises(InputError, match=r"\[teacher\] cache .*: index.json changed"):
        train(load(*overrides), resume=True)


def test_the_command_writes_a_cache(recipe, load, teacher_set, capsys):
    more = [f"--set={one}" for one in (*OFF, teacher_set)]
    assert main(["teacher-cache", str(recipe), *more]) == 2
    assert "expected a path or url, and the cache" in capsys.readouterr().err
    more.append(f"--set=teacher.cache={recipe.parent / 'cache'}")
    assert main(["teacher-cache", str(recipe), "--sampled", *more]) == 2
    assert "--sampled: expected --top-k K too" in capsys.readouterr().err
    drawn = f"--set=teacher.cache={recipe.parent / 'drawn'}"
    assert main(["teacher-cache", str(recipe), "--top-k", "8", "--sampled", *more, drawn]) == 0
    assert "8 sampled of 1" in capsys.readouterr().out
    assert main(["teacher-cache", str(recipe), "--top-k", "8", *more]) == 0
    assert "8 of 1" in (said := capsys.readouterr().out) and "bytes a token" in said
    assert main(["train", str(recipe), *more, "--dry-run"]) == 0
    assert main(["train", str(recipe), *more]) == 0
    losses = [line["loss"] for line in read_metrics(recipe.parent / "run" / "metrics.jsonl")]
    assert len(losses) == 8 and losses[0] > 0


@pytest.mark.slow
def test_two_processes_write_a_cache_and_train_from_it(recipe, load, teacher_set):
    """As two with the teacher in each do; killed while they write, they go on."""
    root, more = recipe.parent, [f"--set={one}" for one in (*OFF, "train.micro_batch_size=1")]
    cache = [*more, f"--set={teacher_set}", f"--set=teacher.cache={root}/cache"]
    writing = [*TWO, "-m", "kdkernels.training.cli", "teacher-cache", str(recipe), *cache]
    process = start(writing, cwd=root)
    while process.poll() is None and not list((root / "cache").glob("manifest.json")):
        time.sleep(0.05)
    process.kill()
    process.wait()
    time.sleep(3)  # the launcher's own processes end after it
    assert "32 samples" in finish(start(writing, cwd=root), root)
    assert {path.name[:9] for path in (root / "cache").glob("part-*")} == {"part-0000", "part-0001"}
    found = []
    for name, own in (("live", teacher_set), ("stored", f"teacher.cache={root}/cache")):
        own = [*more, f"--set={own}", f"--set=run.output={root}/{name}"]
        finish(start([*TWO, "-m", "kdkernels.training.cli", "train", str(recipe), *own], cwd=root), root)
        found.append((untimed(root / name), final_weights(root / name)))
    check_same(*found)


@pytest.mark.slow
def test_two_processes_end_when_one_of_them_gets_no_answer(recipe, load, teacher_set):
    service, root = serving.service(teacher_set.partition("=")[2], "float32"), recipe.parent
    seen = []

    def answer(path, body):
        seen.append(path)
        if path == "/states" and seen.count(path) > 4:
            raise ConnectionError  # of this request alone: the other process gets its answer
        return service.answer(path, body)

    with faulty_server(answer) as server:
        more = [f"--set={one}" for one in (*GKD, "train.steps=6", f"teacher.url={server.url}")]
        process = start([*TWO, "-m", "kdkernels.training.cli", "train", str(recipe), *more], cwd=root)
        assert process.wait(timeout=240) != 0
    printed = (root / "output.txt").read_text()
    assert "exitcode  : 6" in printed and "/states: asked 6 times" in printed
    assert 0 < len(read_metrics(root / "run" / "metrics.jsonl")) < 6


def test_inputs_are_read_without_a_cache(load, teacher_set):
    config = load(*OFF, teacher_set)
    assert len(read_inputs(config, kd.GKD()).examples.usable) == 32
