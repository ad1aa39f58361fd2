"""`mole-mega verify-gpu` where no GPU is: the CPU stands in for one, so that what the command does is proved, and that
it sees what is wrong. Its workers run in this process."""

import importlib
import json
import math
from dataclasses import replace

import pytest
import torch

from mole_mega import verify_gpu
from mole_mega.data.conversation import IGNORE_INDEX
from mole_mega.estimate.gpus import GPUS, find_gpu
from mole_mega.models.sizes import SIZES
from mole_mega.platform.processor import Device
from mole_mega.training import device_parity, device_speed
from mole_mega.training.device_parity import SETTINGS, Setting, device_cases, device_sizes
from mole_mega.training.device_speed import Speed, figures, fitting, speed_cases
from mole_mega.training.parity import batches, scaled_down
from mole_mega.training.step import Stepper

A100, H100, B200 = (
    Device("NVIDIA A100-SXM4-80GB", 80 * 2**30, (8, 0), (13, 0)),
    Device("NVIDIA H100 80GB HBM3", 80 * 2**30, (9, 0), (13, 0)),
    Device("NVIDIA B200", 180 * 10**9, (10, 0), (13, 0)),
)
ROUTER = "language_model.decoder.layers.1.mlp.router.weight"
# bf16 products are slow where the processor has none
ROUNDED = Setting("base kept in FP8", "fp8", {"fp8.store_base": True})
STORED = next(setting for setting in SETTINGS if "stored" in setting.name)
FEW = (SETTINGS[0], ROUNDED, STORED)


def run_here(module, arguments, nproc, environment=None):
    assert nproc == 1
    return importlib.import_module(module).main(arguments)


@pytest.fixture
def rehearse(monkeypatch, tmp_path):
    """rehearse(*arguments) runs the command on the CPU, with FEW settings; its exit code and file."""
    for module in (device_parity, device_speed):
        monkeypatch.setattr(module, "launch_worker", run_here)
        monkeypatch.setattr(module, "SETTINGS", FEW)
    _, small = scaled_down(verify_gpu.made_up_run(), None)
    monkeypatch.setattr(device_parity, "device_sizes", lambda *_, **__: {"tiny": small})
    monkeypatch.setattr(device_speed, "TIMED_STEPS", 1)
    monkeypatch.setattr(device_speed, "WARM_STEPS", 1)

    def rehearse(*arguments):
        out = tmp_path / "verify_gpu.json"
        code = verify_gpu.main([*arguments, "--rehearse", "--json", str(out), "--debug"])
        return code, json.loads(out.read_text())

    return rehearse


def scale_gradient(monkeypatch, factor, key=ROUTER):
    """The gradient of one tensor is wrong wherever the base is kept in FP8."""
    backward = Stepper.backward

    def wrong(self, *args, **kwargs):
        backward(self, *args, **kwargs)
        if self.run.fp8.store_base:
            dict(self.model.module.named_parameters())[key].main_grad.mul_(factor)

    monkeypatch.setattr(Stepper, "backward", wrong)


def test_a_rehearsal_finds_the_cpu_equal_to_itself_and_times_it(rehearse, capsys):
    code, report = rehearse()
    assert code == 0
    assert report["format"] == 1 and report["rehearsal"] and report["device"] == "cpu" and report["gpus"] == []
    assert torch.__version__.startswith(report["versions"]["torch"])
    rows = {row["case"]: row for row in report["precision"]}
    assert list(rows) == [f"tiny, {setting.name}, {gate}" for setting in FEW for gate in ("its own gate", "gate dense")]
    exact, rounded = rows["tiny, fp32, its own gate"], rows["tiny, base kept in FP8, gate dense"]
    assert (exact["status"], exact["loss"], exact["gradient"], exact["gain"], exact["weight"]) == ("equal", 0, 0, 0, 0)
    # attention's 8 and a bank's 6 in 4 layers, router weights and biases, and the projector
    assert exact["num_tensors"] == 4 * (8 + 6 + 2) + 4
    assert rounded["status"] == "equal" and 0.01 < rounded["gradient"] < rounded["tolerance"]["gradient"]
    assert 0 < rounded["gain"] < rounded["tolerance"]["gain"]
    skipped = rows[f"tiny, {STORED.name}, gate dense"]
    assert (skipped["status"], skipped["reason"]) == ("skipped", "Transformer Engine computes on CUDA alone")
    assert "verify-parallel" in report["layouts"][0]["reason"]
    timed, left_out = report["speed"]
    assert timed["status"] == "measured" and left_out["status"] == "skipped"
    assert timed["tokens_per_second"] == pytest.approx(timed["tokens_per_step"] / timed["seconds_per_step"])
    assert timed["tokens_per_step"] == 2 * timed["length"] and timed["operations_per_step"] > 0
    assert timed["peak_bytes"] > timed["estimated_bytes"] > 0  # the whole process, here
    assert timed["share_of_peak"] is timed["gpu"] is None
    text = capsys.readouterr().out
    assert "rehearsal on the CPU" in text and "tokens/s" in text


@pytest.mark.parametrize("factor", [0.5, 1.5, math.nan])
def test_a_wrong_gradient_is_found_and_named(rehearse, monkeypatch, capsys, factor):
    monkeypatch.setattr(device_parity, "SETTINGS", (SETTINGS[0], ROUNDED))
    # one case is enough
    monkeypatch.setattr(device_parity, "device_cases", lambda *given: device_cases(*given)[-1:])
    scale_gradient(monkeypatch, factor)
    code, report = rehearse("--parts", "precision")
    if math.isnan(factor):  # the run skips such a step, and the record ends
        assert code == 3 and report["precision"][0]["status"] == "failed"
        return
    (row,) = report["precision"]
    assert code == 3 and row["status"] == "differs"
    assert row["gain_tensor"] == ROUTER and row["gain"] > row["tolerance"]["gain"]
    assert "differs" in capsys.readouterr().out


def test_a_case_that_fails_says_how_and_leaves_the_others(rehearse, monkeypatch):
    record = device_parity.parity.record

    def fail(run, size, parallel):
        if run.fp8.store_base:
            raise RuntimeError("CUDA error:\n no kernel image")
        return record(run, size, parallel)

    monkeypatch.setattr(device_parity.parity, "record", fail)
    code, report = rehearse("--parts", "precision")
    assert code == 3
    found = {row["case"]: (row["status"], row["reason"]) for row in report["precision"]}
    assert found["tiny, base kept in FP8, its own gate"] == ("failed", "RuntimeError: CUDA error: no kernel image")
    assert found["tiny, fp32, its own gate"] == ("equal", "")


def test_without_a_gpu_everything_is_skipped_with_the_reason_and_nothing_is_called_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mole_mega.platform.processor.cuda_devices", list)
    out = tmp_path / "found.json"
    assert verify_gpu.main(["--json", str(out), "--parts", "precision,layouts", "--debug"]) == 77
    report = json.loads(out.read_text())
    assert report["device"] is None and not report["rehearsal"]
    for part in ("precision", "layouts"):
        (row,) = report[part]
        assert row["status"] == "skipped" and row["reason"].startswith("no GPU: ")
    assert report["speed"] == [{"case": "all", "status": "skipped", "reason": "left out by --parts"}]
    assert "no GPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus must be at least 1, got 0"),
        (["--parts", "precision,sped"], "--parts has 'sped'; there are precision, layouts, speed"),
        (["--json", "."], "--json: . is a folder"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert verify_gpu.main([*arguments, "--debug"]) == 2
    assert message in capsys.readouterr().err


def test_the_file_says_what_was_computed_and_nothing_of_the_data(tmp_path, monkeypatch):
    run = tmp_path / "run.yaml"
    run.write_text(json.dumps({
        "run_dir": "secret_out", "model": {"base": "secret_base"}, "train": {"steps": 1}, "adapter": {"rank": 7},
        "data": {"sources": [{"name": "secret", "path": "secret.json"}]},
    }))  # fmt: skip
    monkeypatch.setattr("mole_mega.platform.processor.cuda_devices", list)
    out = tmp_path / "found.json"
    assert verify_gpu.main([str(run), "--json", str(out), "--debug"]) == 77
    assert json.loads(out.read_text())["run"]["adapter.rank"] == "7"
    assert "secret" not in out.read_text()


@pytest.mark.parametrize(
    ("device", "te_error", "left_out"),
    [
        (A100, "", ["fp8 delayed", "fp8 tensorwise", "fp8 blockwise", "fp8 mxfp8"]),
        (H100, "", ["fp8 mxfp8"]),
        (B200, "", []),
        (B200, "not installed", ["bf16, Transformer Engine", "fp8 delayed", "fp8 tensorwise", "fp8 blockwise"]),
    ],
)
def test_settings_that_a_gpu_lacks_are_left_out_with_the_reason(device, te_error, left_out):
    reasons = {setting.name: setting.why_not([device], te_error) for setting in SETTINGS}
    assert {name for name, reason in reasons.items() if not reason} >= {"fp32", "bf16", "bf16, base kept in FP8"}
    for name in left_out:
        assert te_error in reasons[name] and reasons[name]
    if not te_error:
        tensorwise = "fp8 tensorwise" in left_out
        alone = {name: reason for name, reason in reasons.items() if "stored" not in name and " 2" not in name}
        assert [name for name, reason in alone.items() if reason] == left_out
        assert bool(reasons["fp8 tensorwise, base stored in FP8"]) == tensorwise
        assert all(device.name in reason for reason in alone.values() if reason)
    assert not te_error or all(te_error in reasons[name] for name in reasons if name.startswith("fp8"))


def test_every_setting_is_a_run_of_its_own_on_sizes_that_fp8_divides():
    run, _ = scaled_down(verify_gpu.made_up_run(), None)
    assert [setting.why_not([B200], "") for setting in SETTINGS if setting.processes > 1] == [
        "needs 2 GPUs, and there is 1"
    ] * 2
    cases = device_cases(run, device_sizes(), [B200, B200], "")
    assert len(cases) == 2 * 2 * len(SETTINGS) and not any(case.why_not for case in cases)
    chosen = {case.setting.name: case.run for case in cases}
    assert chosen["fp8 blockwise"].fp8.recipe == "blockwise" and chosen["fp8 blockwise"].train.precision == "fp8"
    assert chosen["fp8 tensorwise, base stored in FP8"].fp8.store_base
    assert chosen["bf16, base kept in FP8"].model.backend == "local"
    for heads_per_group in (1, 2, 4, 8):
        for size in device_sizes(heads_per_group).values():
            widths = size.language.hidden_size, size.language.ffn_hidden_size, size.vision.hidden_size
            assert all(width % 128 == 0 for width in widths)
            assert size.language.num_heads // size.language.num_kv_heads == heads_per_group


def test_batches_padded_for_a_recipe_hold_the_same():
    _, size = scaled_down(verify_gpu.made_up_run(), None)
    for plain, padded in zip(batches(size, 1, 0, 1), batches(size, 1, 0, 1, 96), strict=True):
        length = plain.tokens.shape[1]
        assert padded.tokens.shape[1] % 96 == 0 and not padded.padding_mask[:, length:].any()
        assert (padded.labels[:, length:] == IGNORE_INDEX).all() and not padded.image_mask[:, length:].any()
        for name in ("tokens", "labels", "padding_mask", "position_ids", "image_mask"):
            assert torch.equal(getattr(plain, name), getattr(padded, name)[:, :length])


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100_40"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_gpu_is_known_by_its_name_or_not_at_all(name, key):
    assert find_gpu(name) is (GPUS[key] if key else None)


def test_shares_of_the_peak_are_of_the_precision_that_multiplies():
    run, size = verify_gpu.made_up_run(), SIZES["llava15_7b"]
    speed = Speed(seconds_per_step=2.0, tokens_per_step=4096, operations_per_step=989e12, peak_bytes=10)
    cases = {case.setting.name: case for case in speed_cases(run, size, [H100], "")}
    found = {name: figures(cases[name], speed, GPUS["h100"]) for name in ("bf16", "fp8 tensorwise")}
    assert found["bf16"]["tokens_per_second"] == 2048
    assert found["bf16"]["tflops_per_second"] == pytest.approx(494.5)
    assert found["bf16"]["share_of_peak"] == pytest.approx(0.5)
    assert found["fp8 tensorwise"]["share_of_peak"] == pytest.approx(989 / 2 / 1979)
    assert found["bf16"]["estimated_seconds_per_step"] > 0


def test_as_many_layers_are_timed_as_fit():
    run, size = verify_gpu.made_up_run(), SIZES["llava15_7b"]
    whole = speed_cases(run, size, [H100], "")[0].size
    assert whole.language.num_layers == 32
    small = fitting(replace(run, data=replace(run.data, max_length=2048)), size, 16 * 2**30).language
    assert small.num_layers < 32 and small.hidden_size == 4096
