"""Runs of the trainer in one process: the log, the checkpoints, going on after an interruption, the adapters."""

import json
import math

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava_piip.data import ModalityLengthSampler
from llava_piip.loading import load_trained
from llava_piip.train.checkpointing import run_folder
from llava_piip.train.train import main, run

UPDATES = 12


@pytest.fixture(scope="module")
def reference(files, tmp_path_factory):
    """A whole run of 12 updates in 2 epochs."""
    trainer, checkpoint = files.trainer(tmp_path_factory.mktemp("reference") / "run", "--projector_lr", "1e-3")
    assert checkpoint is None
    run(trainer, None)
    return trainer


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if "loss" in entry]


def test_the_loss_falls_and_every_update_is_logged(reference, losses):
    found = losses(reference)
    assert list(found) == list(range(1, UPDATES + 1))
    assert found[1] == pytest.approx(math.log(909), abs=0.2) and found[UPDATES] < 0.7 * found[1]


def test_each_part_learns_at_its_rate_on_the_cosine_with_warm_up(reference):
    warmup = math.ceil(0.03 * UPDATES)
    shape = [
        k / warmup if k < warmup else 0.5 * (1 + math.cos(math.pi * (k - warmup) / (UPDATES - warmup)))
        for k in range(UPDATES)
    ]
    for part, rate in (("projector", 1e-3), ("language_model", 1e-2), ("vision_tower", 1e-2)):
        expected = pytest.approx([rate * factor for factor in shape], abs=1e-12)
        assert logged(reference, f"learning_rate_{part}") == expected


def test_the_log_has_throughput_and_memory(reference):
    assert all(value > 0 for value in logged(reference, "tokens_per_second") + logged(reference, "peak_memory_gb"))
    images = logged(reference, "images_per_second")
    assert sum(value > 0 for value in images) >= 8 and 0 in images  # some updates are of text alone
    assert all("grad_norm" in entry for entry in reference.state.log_history if "loss" in entry)


def test_nothing_is_clipped(reference, files, tmp_path, losses):
    assert reference.args.max_grad_norm == 0
    clipped, _ = files.trainer(
        tmp_path / "run", "--projector_lr", "1e-3", "--max_grad_norm", "1e-9", "--max_steps", "3"
    )
    clipped.train()
    assert losses(clipped)[3] != pytest.approx(losses(reference)[3], abs=1e-3)  # AdamW's epsilon makes it visible


def test_the_order_of_samples_is_that_of_the_sampler(reference):
    sampler = reference._get_train_sampler()
    assert isinstance(sampler, ModalityLengthSampler)
    assert (sampler.batch_size, sampler.batches_per_step, sampler.seed) == (2, 2, 42)
    assert sampler.lengths == reference.train_dataset.modality_lengths and min(sampler.lengths) < 0


def test_checkpoints_and_the_result_are_complete_models_for_transformers(reference, files):
    run = run_folder(reference.args.output_dir)
    assert [path.name for path in run.checkpoints()] == [f"checkpoint-{step}" for step in (3, 6, 9, 12)]
    assert not (run.path / run.STAGING).exists() and not list(run.path.rglob("*.bin"))
    for folder in (run.path / "checkpoint-12", run.path / "final"):
        model = AutoModelForImageTextToText.from_pretrained(folder)
        for name, tensor in reference.model.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0, msg=name)
        processor = AutoProcessor.from_pretrained(folder)
        assert processor.image_seq_length == 4 and processor.image_processor.pad_to_square
    original = load_file(files.model / "model.safetensors")
    assert set(load_file(run.path / "final" / "model.safetensors")) == set(original)


@pytest.mark.parametrize("kind", ["everything", "adapters", "projector"])
def test_an_interrupted_run_goes_on_to_the_same_losses_and_weights(files, tmp_path, losses, kind):
    more = {
        "everything": [],
        # dropout needs the state of the random numbers to be restored too
        "adapters": ["--train_parts", "projector", "--lora", "true", "--lora_rank", "4", "--lora_dropout", "0.3"],
        "projector": ["--train_parts", "projector", "--chat_template", "llava_v1", "--pad_to_square", "false"],
    }[kind]
    more += ["--max_steps", "4", "--save_steps", "2"]
    whole, _ = files.trainer(tmp_path / "whole", *more)
    run(whole, None)

    class Interrupt(BaseException):
        pass

    broken, _ = files.trainer(tmp_path / "broken", *more)
    step = broken.training_step

    def interrupted(*args, **kwargs):
        if broken.state.global_step == 3:
            raise Interrupt
        return step(*args, **kwargs)

    broken.training_step = interrupted
    with pytest.raises(Interrupt):
        broken.train()
    again, checkpoint = files.trainer(tmp_path / "broken", *more, "--resume", "true")
    assert checkpoint.name == "checkpoint-2"
    run(again, checkpoint)
    assert losses(again) == losses(whole)
    first, second = (dict(trainer.model.state_dict()) for trainer in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    saved, processor = load_trained(tmp_path / "broken")
    assert set(saved.state_dict()) == set(first)
    assert all(torch.equal(first[name], tensor) for name, tensor in saved.state_dict().items())
    assert processor.image_processor.pad_to_square == (kind != "projector")


def first_batches(trainer):
    """The micro batches of the first update."""
    loader = iter(trainer.get_train_dataloader())
    return [next(loader) for _ in range(trainer.args.gradient_accumulation_steps)]


@pytest.mark.parametrize("average", ["batch", "micro_batch"])
def test_the_loss_is_averaged_as_asked_for(files, tmp_path, losses, average):
    settings = ("--loss_average", average, "--max_steps", "1", "--save_strategy", "no", "--group_by_modality", "false")
    trainer, _ = files.trainer(tmp_path / "run", *settings)
    means, counts = [], []
    with torch.no_grad():
        for batch in first_batches(trainer):
            logits = trainer.model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits
            labels = batch["labels"][:, 1:]
            means.append(torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels, ignore_index=-100))
            counts.append((labels != -100).sum())
    means, counts = torch.stack(means), torch.stack(counts)
    by_token, by_batch = ((means * counts).sum() / counts.sum()).item(), means.mean().item()
    assert abs(by_token - by_batch) > 1e-5  # the batches have different lengths, so it makes a difference
    trainer.train()
    assert losses(trainer)[1] == pytest.approx(by_token if average == "batch" else by_batch, abs=2e-6)


def test_mistakes_end_in_one_line_and_status_2(files, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("")
    for arguments, message in (
        (files.command(tmp_path / "run"), "is not empty (notes.txt)"),
        (files.command(tmp_path / "new", "--model", "piip_llava_clip_bl_512_256_8b"), "piip_llava_clip_bl_512_256_8b"),
        (files.command(tmp_path / "new2", "--annotations", "none.json"), "none.json"),
        (files.command(tmp_path / "new3", "--projector", str(files.model)), "has no trained.json"),
        (
            files.command(
                tmp_path / "new6", "--model", "a_row", "--train_parts", "projector", *("--pretrained_vision", "0")
            ),
            "pretrained_vision=False: expected 'vision_tower'",
        ),
        (files.command(tmp_path / "new4", "--chat_template", "vicuna"), "chat_template 'vicuna' is unknown"),
        (files.command(tmp_path / "new5", "--image_root", str(tmp_path / "nowhere")), "nowhere"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and message in error
        assert "Traceback" not in error


def test_a_broken_image_in_a_worker_stops_with_its_name_or_is_skipped_and_counted(files, tmp_path, capfd):
    images = tmp_path / "images"
    images.mkdir()
    for path in files.images.iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    (images / "4.png").write_bytes(b"")
    more = (
        "--image_root",
        str(images),
        "--dataloader_num_workers",
        "1",
        "--save_strategy",
        "no",
        "--num_train_epochs",
        "1",
    )
    assert main(files.command(tmp_path / "run", *more)) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert "error: " in error and "4.png" in error and "Traceback" not in error
    entries = json.loads(files.annotations.read_text())
    (tmp_path / "more.json").write_text(json.dumps([{"id": None}, *entries]))
    more = (*more, "--annotations", str(tmp_path / "more.json"))
    assert main(files.command(tmp_path / "third", *more)) == 2
    assert "entry 0: 'id' is None" in capfd.readouterr().err.strip().splitlines()[-1]
    assert main(files.command(tmp_path / "other", *more, "--on_error", "skip")) == 0
    assert "data: 1 malformed entries left out, 1 samples skipped" in capfd.readouterr().out


def test_links_out_of_the_image_folder_are_followed_on_request(files, tmp_path, capfd):
    images = tmp_path / "images"
    images.mkdir()
    for path in files.images.iterdir():
        (images / path.name).symlink_to(path)
    more = ("--image_root", str(images), "--save_strategy", "no", "--max_steps", "1")
    assert main(files.command(tmp_path / "run", *more)) == 2
    assert "is behind a link" in capfd.readouterr().err.strip().splitlines()[-1]
    assert main(files.command(tmp_path / "other", *more, "--follow_links", "true")) == 0


def test_adapters_learn_on_a_language_model_in_4_bits(files, tmp_path, losses):
    more = ("--train_parts", "projector", "--lora", "true", "--lora_rank", "4", "--bits", "4", "--bf16", "true")
    trainer, _ = files.trainer(tmp_path / "run", *more, "--save_strategy", "no", "--lora_dropout", "0")
    base = trainer.model.get_base_model()
    quantised = [name for name, module in base.named_modules() if type(module) is bitsandbytes.nn.Linear4bit]
    assert len(quantised) == 2 * 7 and all(name.startswith("model.language_model.layers") for name in quantised)
    weights = {n: p.detach().clone() for n, p in base.named_parameters() if not p.requires_grad}
    assert any(p.dtype == torch.uint8 for p in weights.values())
    assert {p.dtype for p in base.parameters() if p.requires_grad} == {torch.float32}
    run(trainer, None)
    found = losses(trainer)
    assert found[UPDATES] < found[1] - 0.1
    assert all(torch.equal(dict(base.named_parameters())[name], weight) for name, weight in weights.items())

    # the save is for the language model in any precision: full here, as merging has it
    saved = dict(load_trained(tmp_path / "run")[0].named_parameters())
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(saved[name], parameter, rtol=0, atol=0, check_dtype=False, msg=name)
