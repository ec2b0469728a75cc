"""Converted models pass against their originals; every kind of damage fails and its layer is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from foreign import VERSIONS, blinkdl_state_dict, hf_config, hf_state_dict, scan_of
from safetensors.torch import load_file, save_file

from rwkv_rev.conversion import convert
from rwkv_rev.equivalence import verification
from rwkv_rev.equivalence.naive_model import naive_logits
from rwkv_rev.equivalence.oracles import ORACLES, OracleUnavailable
from rwkv_rev.equivalence.original import Original
from rwkv_rev.equivalence.report import Report
from rwkv_rev.equivalence.verification import verify_directory
from rwkv_rev.errors import DataError, RwkvRevError, SourceError

PEER = Path(__file__).parents[2] / "shared" / "peer"
Damage = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Converts a source once for the module; treat the folder as read-only."""
    made: dict[str, Path] = {}

    def make(source: str, **options: object) -> Path:
        key = f"{source} {options}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("converted") / "model"
            convert(source, made[key], **options)
        return made[key]

    return make


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A byte-level random checkpoint of every version."""
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {}
    for version in VERSIONS:
        paths[version] = folder / f"{version}.pth"
        torch.save(blinkdl_state_dict(version, layers=3, vocab=256), paths[version])
    return paths


def damaged(model: Path, copy: Path, damage: Damage) -> Path:
    """A copy of a converted folder with other weights."""
    shutil.copytree(model, copy)
    tensors = load_file(copy / "model.safetensors")
    damage(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize(
    ("source", "oracles", "settings"),
    [
        ("bundled:rwkv-4", {"rwkv", "transformers", "naive"}, {"tokens": 300}),
        ("bundled:rwkv-5.2", {"rwkv", "naive"}, {}),
    ],
)
def test_bundled_checkpoints_hold_the_promise(
    converted: Callable[..., Path], source: str, oracles: set[str], settings: dict[str, int]
) -> None:
    pytest.importorskip("rwkv")
    report = verify_directory(converted(source), **settings)
    assert {row.oracle for row in report.rows} == oracles
    for row in report.rows:
        assert row.comparison.tokens == settings.get("tokens", 1024)
        assert row.comparison.largest <= 1e-4
        assert row.comparison.top1 == 1
        assert row.tolerance == 1e-4
        assert row.comparison.converted_bits == pytest.approx(row.comparison.original_bits, abs=1e-5)
    assert report.passed
    assert report.divergence is None
    assert report.original == source


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_passes(
    converted: Callable[..., Path], checkpoints: dict[str, Path], version: str
) -> None:
    report = verify_directory(converted(str(checkpoints[version])), oracle="naive", tokens=150)
    assert report.passed, report.table()
    in_one = 8 * 3 if version == "6" else 0  # five maps in one tensor, twice in a layer
    assert report.weights.tensors == len(blinkdl_state_dict(version, layers=3)) + in_one


@pytest.mark.parametrize("version", ["4", "5.2"])
def test_hugging_face_layouts_are_read_as_originals(tmp_path: Path, version: str) -> None:
    pytest.importorskip("rwkv")
    source = tmp_path / "source"
    source.mkdir()
    save_file(hf_state_dict(version, vocab=256), source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps(hf_config(version, vocab=256)))
    convert(str(source), tmp_path / "model")
    report = verify_directory(tmp_path / "model", tokens=60)
    assert report.passed, report.table()
    assert {"rwkv", "naive"} <= {row.oracle for row in report.rows}


@pytest.mark.parametrize(
    ("peer", "options", "oracles", "passed"),
    [
        ("tiny-rwkv-4v0-660K", {}, ["rwkv", "transformers", "naive", "expected"], True),
        ("tiny-rwkv-5v2-730K", {"group_norm_eps": 1e-5}, ["naive", "expected"], True),
        ("tiny-rwkv-5v2-730K", {}, ["rwkv", "naive", "expected"], False),
    ],
    ids=["4", "5.2 with eps 1e-5", "5.2 with the default eps"],
)
def test_peers_reproduce_their_expected_logits(
    converted: Callable[..., Path], peer: str, options: dict[str, float], oracles: list[str], passed: bool
) -> None:
    pytest.importorskip("rwkv")
    if not PEER.is_dir():
        pytest.skip("no ../shared/peer")
    report = verify_directory(converted(str(PEER / f"{peer}.pth"), **options), tokens=64)
    assert [row.oracle for row in report.rows] == oracles
    assert report.passed == passed
    expected = report.rows[-1]
    assert expected.passed == passed
    if passed:
        assert expected.comparison.largest <= 1e-4
        assert report.divergence is None
    else:
        assert report.divergence is not None
        assert report.divergence.startswith("block 0 time mix")
        assert report.divergence.endswith("the expected logits fit --group-norm-eps 1e-05")
    if options:
        assert report.skipped["rwkv"].startswith("the rwkv package has GroupNorm eps 0.00064 built in")


def flip(name: str, index: int = 3) -> Damage:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[index] *= -1

    return damage


def swap(one: str, other: str) -> Damage:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return damage


B = "model.blocks"
DAMAGES = [
    ("4", "embeddings", 1, flip("model.embeddings.weight", 32 * ord("t"))),
    ("5.2", "embeddings", 1, flip("model.ln0.bias")),
    ("4", "block 1 time mix", 1, flip(f"{B}.1.ln1.weight")),
    ("5.0", "block 1 time mix", 1, flip(f"{B}.1.time_mix.key.weight")),
    ("4", "block 2 time mix", 1, flip(f"{B}.2.time_mix.bonus")),
    ("5.2", "block 2 time mix", 1, flip(f"{B}.2.time_mix.time_decay")),
    ("5.1", "block 1 time mix", 1, flip(f"{B}.1.time_mix.ln_x.weight")),
    ("5.2", "block 1 channel mix", 1, flip(f"{B}.1.channel_mix.value.weight")),
    ("4", "ln_out", 1, flip("model.ln_out.weight")),
    ("5.2", "head", 1, flip("head.weight")),
    ("4", "block 0 time mix", 2, swap(f"{B}.0.time_mix.key.weight", f"{B}.0.time_mix.value.weight")),
    ("5.2", "block 1 time mix", 2, swap(f"{B}.1.time_mix.gate.weight", f"{B}.1.time_mix.output.weight")),
    ("5.1", "block 1 time mix", 2, swap(f"{B}.1.time_mix.mix_key", f"{B}.1.time_mix.mix_value")),
    ("5.0", "block 1 channel mix", 2, swap(f"{B}.1.ln2.weight", f"{B}.2.ln2.weight")),
    ("4", "block 0 channel mix", 2, swap(f"{B}.0.channel_mix.mix_key", f"{B}.0.channel_mix.mix_receptance")),
]


@pytest.mark.parametrize(
    ("version", "place", "count", "damage"),
    DAMAGES,
    ids=[f"{version}-{place}-{i}" for i, (version, place, _, _) in enumerate(DAMAGES)],
)
def test_damage_fails_and_its_layer_is_named(
    converted: Callable[..., Path],
    checkpoints: dict[str, Path],
    tmp_path: Path,
    version: str,
    place: str,
    count: int,
    damage: Damage,
) -> None:
    model = damaged(converted(str(checkpoints[version])), tmp_path / "damaged", damage)
    report = verify_directory(model, oracle="naive", tokens=40)
    assert not report.passed
    assert not report.rows[0].passed
    assert report.divergence is not None
    assert report.divergence.startswith(place)
    assert len(report.weights.different) == count
    assert place in report.summary


def test_weight_of_a_token_the_text_lacks(
    converted: Callable[..., Path], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """No logit shows it; the comparison of the values does."""
    damage = flip("model.embeddings.weight", 32 * 255)
    model = damaged(converted(str(checkpoints["4"])), tmp_path / "damaged", damage)
    report = verify_directory(model, oracle="naive", tokens=100)
    assert all(row.passed for row in report.rows)
    assert not report.passed
    assert report.divergence == "embeddings"
    assert "model.embeddings.weight (1 of 8192 values)" in report.summary


def test_nan_fails(converted: Callable[..., Path], checkpoints: dict[str, Path], tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{B}.1.channel_mix.key.weight"][0, 0] = torch.nan

    model = damaged(converted(str(checkpoints["5.2"])), tmp_path / "damaged", damage)
    report = verify_directory(model, oracle="naive", tokens=100)
    assert not report.rows[0].passed
    assert str(report.divergence).startswith("block 1 channel mix")
    row = json.loads(json.dumps(report.to_dict(), allow_nan=False))["oracles"][0]
    assert row["largest_delta"] is None
    assert row["passed"] is False


def test_eps_changed_behind_the_conversions_back(
    converted: Callable[..., Path], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model = shutil.copytree(converted(str(checkpoints["5.2"])), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"group_norm_epsilon": 1e-5}))
    report = verify_directory(model, oracle="naive", tokens=100)
    assert not report.passed
    assert report.weights.passed
    assert str(report.divergence).startswith("block 0 time mix")


@pytest.mark.parametrize(("dtype", "exact"), [("float32", True), ("bfloat16", False), ("float16", False)])
def test_narrower_dtypes_are_close_and_exactly_their_rounding(
    converted: Callable[..., Path], checkpoints: dict[str, Path], dtype: str, exact: bool
) -> None:
    model = converted(str(checkpoints["5.1"]), dtype=dtype)
    report = verify_directory(model, oracle="naive", tokens=200)
    assert report.passed, report.table()
    if exact:
        assert [row.oracle for row in report.rows] == ["naive"]
        assert report.weights.rounded_to is None
        return
    close, rounded = report.rows
    assert rounded.oracle == "naive, rounded"
    assert rounded.tolerance == 1e-4
    assert close.tolerance > close.comparison.largest > 1e-4
    assert report.weights.rounded_to == getattr(torch, dtype)
    assert f"rounded to {dtype}" in report.table()
    assert f"rounding to {dtype}" in report.summary


def test_wider_dtype_is_exact(converted: Callable[..., Path]) -> None:
    report = verify_directory(converted("bundled:rwkv-4", dtype="float32"), oracle="naive", tokens=50)
    assert report.passed
    assert report.weights.rounded_to is None


def test_damage_under_rounding_is_still_found(
    converted: Callable[..., Path], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model = converted(str(checkpoints["5.1"]), dtype="bfloat16")
    report = verify_directory(
        damaged(model, tmp_path / "damaged", flip(f"{B}.2.time_mix.gate.weight")), oracle="naive", tokens=100
    )
    assert not report.passed
    assert str(report.divergence).startswith("block 2 time mix")


def test_short_text_is_said(converted: Callable[..., Path]) -> None:
    report = verify_directory(converted("bundled:rwkv-4"), oracle="naive", text="Hello world", tokens=50)
    assert report.rows[0].comparison.tokens == 11
    assert "the text has 11 tokens, fewer than the 50 asked for" in report.notes
    assert report.notes[0] in report.table()


def test_text_file(converted: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("A short text in a file.")
    report = verify_directory(converted("bundled:rwkv-4"), oracle="naive", text=tmp_path / "text", tokens=10)
    assert report.rows[0].comparison.tokens == 10
    with pytest.raises(DataError, match="cannot read the text"):
        verify_directory(converted("bundled:rwkv-4"), text=tmp_path / "missing")


def test_another_original_of_the_same_shape_fails(
    converted: Callable[..., Path], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    torch.save(blinkdl_state_dict("4", layers=3, vocab=256, seed=1), tmp_path / "other.pth")
    model = converted(str(checkpoints["4"]))
    report = verify_directory(model, original=str(tmp_path / "other.pth"), oracle="naive", tokens=20)
    assert not report.passed
    assert report.original == str(tmp_path / "other.pth")


def test_original_of_another_architecture_is_refused(
    converted: Callable[..., Path], checkpoints: dict[str, Path]
) -> None:
    with pytest.raises(RwkvRevError, match=r"is not the original of .*: rwkv_version is 5\.2"):
        verify_directory(converted("bundled:rwkv-4"), original=str(checkpoints["5.2"]))


def test_a_converted_folder_is_no_original(converted: Callable[..., Path]) -> None:
    other = converted("bundled:rwkv-5.2")
    with pytest.raises(
        SourceError, match=r"is a converted model itself, and no original: name .*or leave that out"
    ) as caught:
        verify_directory(converted("bundled:rwkv-4"), original=str(other))
    assert "\n" not in str(caught.value)


def test_explicit_oracle_that_cannot_run(converted: Callable[..., Path]) -> None:
    with pytest.raises(OracleUnavailable, match="RWKV-4 only; use oracle='rwkv'"):
        verify_directory(converted("bundled:rwkv-5.2"), oracle="transformers", tokens=5)


def test_wrong_arguments(converted: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match="must be one of auto, rwkv, transformers, naive"):
        verify_directory(converted("bundled:rwkv-4"), oracle="other")
    with pytest.raises(ValueError, match="at least 4"):
        verify_directory(converted("bundled:rwkv-4"), tokens=0)
    with pytest.raises(SourceError, match="choose from an original"):
        verify_directory(converted("bundled:rwkv-4"), file="a.pth")


def test_original_that_is_gone_or_unknown(tmp_path: Path) -> None:
    torch.save(blinkdl_state_dict("4", vocab=256), tmp_path / "source.pth")
    model = convert(str(tmp_path / "source.pth"), tmp_path / "model").directory
    (tmp_path / "source.pth").rename(tmp_path / "moved.pth")
    with pytest.raises(SourceError, match=r"remembers is gone.*original=SOURCE"):
        verify_directory(model)
    (model / "conversion.json").unlink()
    with pytest.raises(SourceError, match=r"does not say what it was converted from.*original=SOURCE"):
        verify_directory(model)
    report = verify_directory(model, original=str(tmp_path / "moved.pth"), oracle="naive", tokens=20)
    assert report.passed


def test_damaged_expected_file(tmp_path: Path) -> None:
    torch.save(blinkdl_state_dict("4", vocab=256), tmp_path / "source.pth")
    model = convert(str(tmp_path / "source.pth"), tmp_path / "model").directory
    expected = tmp_path / "source.expected.json"
    for content, message in [
        ("{", "does not hold prompt_bytes"),
        ('{"prompt_bytes": [1]}', "does not hold prompt_bytes"),
        ('{"prompt_bytes": [256], "logits_after_last_byte": [0]}', "ids below 256"),
        ('{"prompt_bytes": [1], "logits_after_last_byte": [0]}', "the model has 256"),
    ]:
        expected.write_text(content)
        with pytest.raises(DataError, match=message):
            verify_directory(model, tokens=5)
    wrong = {"prompt_bytes": [1, 2], "logits_after_last_byte": [0.0] * 256}
    expected.write_text(json.dumps(wrong))
    report = verify_directory(model, tokens=5)
    assert not report.passed
    assert report.divergence == "in no layer: the expected logits are not those of the original's tensors"
    assert verify_directory(model, oracle="naive", tokens=5).passed


def with_large_logits(version: str, path: Path) -> Path:
    """A checkpoint whose logits are so large that float32 rounds them by more than the usual tolerance."""
    tensors = blinkdl_state_dict(version, layers=3, vocab=256)
    tensors["head.weight"] *= 500 if version == "4" else 50
    torch.save(tensors, path)
    return path


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints in which an oracle's own float32 noise meets the tolerance."""
    folder = tmp_path_factory.mktemp("noisy")
    return {version: with_large_logits(version, folder / f"{version}.pth") for version in VERSIONS}


def test_the_oracles_own_noise_is_no_difference(noisy: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("rwkv")
    report = convert(str(noisy["5.1"]), tmp_path / "model", verify=True).verification
    assert [row.oracle for row in report.rows] == ["rwkv", "naive"]
    assert_only_rounding(report)


def test_nor_is_that_of_an_oracle_without_float64(
    converted: Callable[..., Path], noisy: dict[str, Path]
) -> None:
    assert_only_rounding(verify_directory(converted(str(noisy["4"])), oracle="transformers", tokens=100))


def assert_only_rounding(report: Report) -> None:
    """It passes, the rounding is beyond the usual tolerance, and said."""
    assert report.passed
    for row in report.rows:
        assert row.comparison.largest > row.tolerance == 1e-4
        assert row.float64.difference <= 1e-9 < 1e-4 < row.float64.oracle_noise
        said = f"{row.oracle}: {row.comparison.largest:.1e} is rounding, which in float32 moves it by"
        assert said in report.table()
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("version", "place", "name"),
    [
        ("5.1", "block 1 channel mix", f"{B}.1.channel_mix.value.weight"),
        ("5.2", "block 2 time mix", f"{B}.2.time_mix.time_decay"),
        ("5.0", "head", "head.weight"),
        ("4", "embeddings", "model.embeddings.weight"),
    ],
)
def test_an_error_of_the_size_of_the_noise_is_found(
    converted: Callable[..., Path],
    noisy: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    place: str,
    name: str,
) -> None:
    """One tensor off by a few units in its last place moves the logits by less than float32 rounds them."""

    def plant(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] *= 1 + 2e-7

    model = damaged(converted(str(noisy[version])), tmp_path / "damaged", plant)
    # what the logits say, whatever the comparison of the values does
    monkeypatch.setattr(
        verification, "compare_weights", lambda *_: verification.WeightComparison(1, (), None)
    )
    report = verify_directory(model, oracle="naive", tokens=100)
    (row,) = report.rows
    assert 1e-9 < row.float64.difference < 3 * row.float64.noise
    assert not report.passed
    assert report.divergence.startswith(place)
    assert f"naive differs by {row.float64.difference:.1e} in float64" in report.summary


def test_an_eps_that_is_nearly_right(
    converted: Callable[..., Path], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """No stored value shows it, and no logit in float32."""
    model = shutil.copytree(converted(str(checkpoints["5.1"])), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"group_norm_epsilon": 64.001e-5}))
    report = verify_directory(model, oracle="naive", tokens=100)
    assert report.rows[0].comparison.largest < 1e-4
    assert not report.passed
    assert report.divergence.startswith("block 0 time mix")


def another_epsilon(original: Original, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> object:
    return naive_logits(original.tensors, tokens, scan=original.scan, group_norm_epsilon=70e-5, dtype=dtype)


def in_float32_only(original: Original, tokens: torch.Tensor, dtype: torch.dtype = torch.float32) -> object:
    if dtype == torch.float64:
        raise OracleUnavailable("no float64")
    for piece in naive_logits(original.tensors, tokens, scan=original.scan):
        yield piece.float() + 1e-2


@pytest.mark.parametrize(
    ("oracle", "reason"),
    [
        (another_epsilon, "in float64, where 1e-09 is allowed"),
        (in_float32_only, "itself 1.0e-02 from the float64 scan"),
    ],
)
def test_an_oracle_that_differs_is_blamed_itself(
    converted: Callable[..., Path],
    checkpoints: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    oracle: Callable[..., object],
    reason: str,
) -> None:
    monkeypatch.setitem(ORACLES, "rwkv", oracle)
    report = verify_directory(converted(str(checkpoints["5.2"])), tokens=60)
    assert [row.passed for row in report.rows] == [False, True]
    assert report.divergence.startswith("in no layer: ")
    assert "logits: rwkv " in report.summary
    assert reason in report.summary


def test_rounding_that_no_other_float32_has_fails(
    converted: Callable[..., Path], checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = verification._logits
    monkeypatch.setattr(verification, "_logits", lambda *arguments: honest(*arguments) + 1e-2)
    report = verify_directory(converted(str(checkpoints["5.2"])), oracle="naive", tokens=60)
    assert not report.passed
    assert "logits: naive agrees in float64, but float32 moves the model by 1.0e-02" in report.summary
    assert report.divergence.startswith("in no layer: ")


def test_rounding_of_expected_logits(
    noisy: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits that somebody wrote down in float32 carry that one's rounding; an error of ten times that is one."""
    without = {name: oracle for name, oracle in ORACLES.items() if name != "rwkv"}
    monkeypatch.setattr("rwkv_rev.equivalence.verification.ORACLES", without)
    source = shutil.copy(noisy["5.1"], tmp_path / "source.pth")
    prompt = list(b"Some words to go on from")
    tensors = torch.load(source, weights_only=True)
    *_, exact = naive_logits(tensors, torch.tensor(prompt), scan=scan_of("5.1"))
    *_, rounded = naive_logits(tensors, torch.tensor(prompt), scan=scan_of("5.1"), dtype=torch.float32)
    rounding = rounded[-1] - exact[-1]
    assert rounding.abs().max() > 1e-5
    model = convert(str(source), tmp_path / "model").directory
    for factor, passed in ((1, True), (10, False)):
        logits = (exact[-1] + factor * rounding).tolist()
        expected = {"prompt_bytes": prompt, "logits_after_last_byte": logits}
        (tmp_path / "source.expected.json").write_text(json.dumps(expected))
        report = verify_directory(model, tokens=20)
        assert report.rows[-1].oracle == "expected"
        assert report.rows[-1].passed == passed
        assert report.passed == passed


def test_float64_rounded_to_float32(tmp_path: Path) -> None:
    torch.save(blinkdl_state_dict("4", vocab=256, dtype=torch.float64), tmp_path / "source.pth")
    for dtype in ("auto", "float32"):
        model = convert(str(tmp_path / "source.pth"), tmp_path / dtype, dtype=dtype).directory
        report = verify_directory(model, oracle="naive", tokens=20)
        assert report.passed, report.table()
        assert report.rows[-1].float64.difference < 1e-12
