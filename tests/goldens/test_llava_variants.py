"""Checkers take every number from the case: cases of the same families with other numbers pass, wrong ones fail."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from checkers import Status
from written_cases import failed, recorded, run_written

PLACEHOLDER, IGNORED = -200, -100
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)


def refused(result):
    return {c.name: c.detail for c in result.comparisons if c.refused}


class Splicing:
    """A case of spliced visual tokens by transformers' Llama, row by row, as the public code deals out images."""

    def __init__(self, tokens, images=4, vocabulary=71, **ids):
        self.config = {
            "vocab_size": vocabulary,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "max_position_embeddings": 256,
            **ids,
        }
        generator = torch.Generator().manual_seed(tokens)
        self.random = lambda *shape: torch.randn(*shape, generator=generator)
        self.decoder = LlamaForCausalLM(LlamaConfig(**self.config)).eval()
        self.decoder.load_state_dict(
            {name: (0.3 * self.random(*x.shape)).half().float() for name, x in self.decoder.state_dict().items()}
        )
        self.features = self.random(images, tokens, self.config["hidden_size"]).half().float()
        self.info = {
            "name": "spliced",
            "family": "llava_splice",
            "config": self.config,
            "tolerance": {"atol": 2e-5},
            "cases": [],
            "generation": [],
        }
        self.tensors = {"image_features": self.features}
        self.tensors |= {f"state.{name}": x for name, x in self.decoder.state_dict().items()}

    def _rows(self, rows, given):
        """Embeddings and places of images of each row."""
        left, last = iter(given), None
        for row in rows:
            parts = []
            if PLACEHOLDER not in row:
                last = next(left, last)
            for token in row:
                last = next(left, last) if token == PLACEHOLDER else last
                text = self.decoder.get_input_embeddings()(torch.tensor([max(token, 0)]))
                parts.append((self.features[last], True) if token == PLACEHOLDER else (text, False))
            places = torch.cat([torch.full((len(part),), place) for part, place in parts])
            yield torch.cat([part for part, _ in parts]), places

    @torch.no_grad()
    def case(self, name, rows, given, *, side="right", limit=None, positions=False):
        spliced = [(x[:limit], place[:limit]) for x, place in self._rows(rows, given or range(len(rows)))]
        width, padded = max(len(x) for x, _ in spliced), {}
        longest = max(map(len, rows))
        for row, (embeds, place) in zip(rows, spliced, strict=True):
            values = torch.tensor([v for token in row for v in [token] * self._count(token)][:limit])
            logits = self.decoder(inputs_embeds=embeds[None]).logits[0]
            found = {
                "inputs_embeds": embeds,
                "logits": logits,
                "attention_mask_out": torch.ones(len(embeds), dtype=torch.long),
                "labels_out": torch.where(place, IGNORED, values),
                "position_ids_out": torch.arange(len(embeds)),
            }
            for key, x in found.items():
                full = x.new_full((width, *x.shape[1:]), IGNORED if key == "labels_out" else 0)
                full[(slice(None, len(x)) if side == "right" else slice(width - len(x), None))] = x
                padded.setdefault(key, []).append(full)
        out = {key: torch.stack(found) for key, found in padded.items()}
        pairs = [
            (logits[:-1][labels[1:] != IGNORED], labels[1:][labels[1:] != IGNORED])
            for logits, labels in zip(out["logits"], out["labels_out"], strict=True)
        ]
        loss = torch.nn.functional.cross_entropy(torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs]))
        fill = [[0] * (longest - len(row)) for row in rows]
        ids = torch.tensor([row + f for row, f in zip(rows, fill, strict=True)])
        mask = torch.tensor([[1] * len(row) + f for row, f in zip(rows, fill, strict=True)])
        given_tensors = {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask > 0, ids, IGNORED)}
        if not positions:
            del out["position_ids_out"]
        self.tensors |= {f"case.{name}.{key}": x for key, x in (given_tensors | out).items()}
        self.info["cases"].append(
            {
                "case": name,
                "padding_side": side,
                "tokenizer_model_max_length": limit,
                "image_indices": given,
                "position_ids_given": positions,
                "attention_mask_given": True,
                "labels_given": True,
                "loss": loss.item(),
            }
        )

    def _count(self, token):
        return self.features.shape[1] if token == PLACEHOLDER else 1

    @torch.no_grad()
    def generation(self, name, rows, given, count=6):
        """Greedy decoding, which ends at what the first row has second; rows that are done get the padding id."""
        new = [self._continued(embeds, count) for embeds, _ in self._rows(rows, given or [])]
        end, pad = new[0][1], self.config["pad_token_id"]
        new = [ids[: ids.index(end) + 1] if end in ids else ids for ids in new]
        longest, width = max(map(len, rows)), max(map(len, new))
        self.tensors[f"gen.{name}.input_ids"] = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        self.tensors[f"gen.{name}.attention_mask"] = torch.tensor(mask)
        ids = [[self.config["bos_token_id"], *row] + [pad] * (width - len(row)) for row in new]
        self.tensors[f"gen.{name}.output_ids"] = torch.tensor(ids)
        info = {"case": name, "image_indices": given, "max_new_tokens": count, "padding_side": "left"}
        self.info["generation"].append(info | {"eos_token_id": end})

    def _continued(self, embeds, count):
        new = []
        for _ in range(count):
            new.append(self.decoder(inputs_embeds=embeds[None]).logits[0, -1].argmax().item())
            embeds = torch.cat([embeds, self.decoder.get_input_embeddings()(torch.tensor(new[-1:]))])
        return new


X = PLACEHOLDER


@pytest.fixture(params=[(1, {}), (4, {}), (7, {"bos_token_id": 5, "eos_token_id": 9, "pad_token_id": 3})], ids=str)
def splicing(request):
    tokens, ids = request.param
    made = Splicing(tokens, **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **ids})
    made.case("three_images_one_row", [[5, X, 6, X, X, 7], [8, 9]], [3, 0, 2, 1])
    made.case("text_first", [[8, 9, 10], [5, X, 6], [X, 11]], [0, 3, 1], positions=True)
    made.case("left", [[5, 6, X, 8], [X, 7]], [2, 1], side="left", positions=True)
    made.case("list_of_three", [[5, X], [6, 7, X], [8, X, 9]], None)
    made.case("reused", [[5, X, 6, X, 7], [X, 8], [9, X]], [1, 0])
    made.case("text_cut", [[5, X, 6, 7, 8, 9, 10], [X, 6]], [0, 1], limit=tokens + 3)
    made.case("not_cut", [[5, X, 6], [X, 6]], [0, 1], limit=100)
    made.case("image_lost", [[5, 6, 7, X, 8], [9, X]], [0, 1], limit=3, side="left")
    made.generation("one_ends_first", [[5, X, 6], [8, X, X, 9, X, 7]], [3, 2, 0, 1])
    made.generation("text", [[5, 6, 7]], None)
    return made


def test_other_tokens_images_and_ids_pass(splicing, tmp_path):
    result = run_written(tmp_path, splicing.info, splicing.tensors)
    assert result.status is Status.PASSED, str(result)
    told = {"case.reused.refused": "more placeholders than images", "case.image_lost.refused": "an image is cut"}
    assert refused(result).keys() == told.keys()
    for name, reason in told.items():
        assert f"{name}: refused as documented ({reason})" in str(result)


def test_a_wrong_number_beside_a_refused_call_fails(splicing, tmp_path):
    splicing.tensors["case.text_first.logits"] = splicing.tensors["case.text_first.logits"] + 0.1
    result = run_written(tmp_path, splicing.info, splicing.tensors)
    assert failed(result) == ["case.text_first.logits"] and refused(result)


@pytest.fixture
def collate():
    """Batches with another missing file, images of another size, and samples in another order."""
    info = recorded("llava_collate")[0]
    order = [3, 6, 0, 5, 2, 4, 1]  # where a sample was
    place = {old: new for new, old in enumerate(order)}
    for key in ("samples", "lengths", "modality_lengths"):
        info[key] = [info[key][old] for old in order]
    info["samples"][place[2]]["image"] = "somewhere/else.jpg"
    for batch in info["batches"]:
        batch["indices"] = [place[old] for old in batch["indices"]]
        if "image_shape" in batch:
            batch["image_shape"][2:] = [48, 48]
    return info


def test_other_files_sizes_and_orders_of_samples_pass(collate, tmp_path):
    result = run_written(tmp_path, collate)
    assert result.status is Status.PASSED, str(result)
    assert "output.6.refused.1" in refused(result)


def test_a_longer_batch_than_recorded_fails(collate, tmp_path):
    collate["batches"][1]["indices"].append(collate["batches"][0]["indices"][0])
    assert "output.1.rows" in failed(run_written(tmp_path, collate))


def mask_entry(name, **changes):
    (entry,) = (e for e in recorded("llava_mask_v1")[0]["cases"] if e["case"] == name and not e["legacy"])
    return entry | {"case": "changed"} | changes


def rounds_cut(limit_after):
    """The recorded conversation of three rounds, with room for `limit_after` more ids than its end tokens say."""
    entry = mask_entry("multi_turn_text")
    ends = [place + 1 for place, token in enumerate(entry["input_ids"]) if token == 2]
    limit = ends[0] + limit_after
    cut = {key: entry[key][:limit] for key in ("input_ids", "intended_labels")}
    supervised = sum(label != IGNORED for label in cut["intended_labels"])
    own = {
        "untruncated_length": len(entry["input_ids"]),
        "model_max_length": limit,
        "n_intended_supervised": supervised,
    }
    return entry | cut | own, len(ends)


def test_conversations_that_lose_two_rounds_pass(tmp_path):
    entry, rounds = rounds_cut(limit_after=3)
    info = recorded("llava_mask_v1")[0] | {"cases": [entry]}
    result = run_written(tmp_path, info)
    assert result.status is Status.PASSED and rounds == 3, str(result)


def test_a_first_round_that_is_cut_is_told(tmp_path):
    entry, _ = rounds_cut(limit_after=-1)
    result = run_written(tmp_path, recorded("llava_mask_v1")[0] | {"cases": [entry]})
    assert result.status is Status.PASSED, str(result)
    (detail,) = refused(result).values()
    assert "not even the first round fits" in detail and entry["n_intended_supervised"] > 0


def without_question(**changes):
    entry = mask_entry("single_turn_text", conversation=[{"from": "gpt", "value": "Hello"}])
    return (
        entry | {"prompt": SYSTEM, "input_ids": [1], "intended_labels": [IGNORED], "n_intended_supervised": 0} | changes
    )


def test_a_conversation_without_a_question_is_told_and_the_rest_compared(tmp_path):
    info = recorded("llava_mask_v1")[0]
    info["cases"].insert(0, without_question())
    result = run_written(tmp_path, info)
    assert result.status is Status.PASSED, str(result)
    line = "output.changed.legacy=False.messages: refused as documented (a conversation without a question)"
    assert line in str(result)
    other = next(e for e in info["cases"] if e["case"] == "multi_turn_image")
    other["intended_labels"][-1] = 5
    assert failed(run_written(tmp_path, info)) == [f"output.multi_turn_image.legacy={other['legacy']}.intended_labels"]


def test_a_refusal_that_is_not_documented_fails(tmp_path):
    turns = [{"from": "human", "value": "Q"}, {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    info = recorded("llava_mask_v1")[0] | {"cases": [mask_entry("single_turn_text", conversation=turns)]}
    result = run_written(tmp_path, info)
    assert failed(result) == ["output.changed.legacy=False.messages"] and not refused(result)
    assert "must alternate" in str(result)


OPEN_TURNS = {
    "open_after_empty_plain": ("plain", [("user", "Q1"), ("assistant", ""), ("user", "Q2"), ("assistant", None)]),
    "no_question": ("v1", [("assistant", None)]),
    "open_after_empty": ("v1", [("user", "Q"), ("assistant", ""), ("assistant", None)]),
}


def open_turns(*names):
    prompts = {
        "open_after_empty_plain": "Q1\nQ2\n",
        "no_question": f"{SYSTEM}ASSISTANT:",
        "open_after_empty": f"{SYSTEM}USER: Q ASSISTANT:ASSISTANT:",
    }
    return [
        {
            "case": name,
            "template": OPEN_TURNS[name][0],
            "messages": [{"role": role, "text": text} for role, text in OPEN_TURNS[name][1]],
            "prompt": prompts[name],
        }
        for name in names
    ]


def test_open_turns_that_templates_refuse_are_told_and_the_rest_compared(tmp_path):
    info = recorded("llava_prompt_templates")[0]
    info["prompts"] = open_turns(*OPEN_TURNS) + info["prompts"]
    info["image_tag_rewriting"].append({"conversation": [{"from": "gpt", "value": "A"}], "after": []})
    result = run_written(tmp_path, info)
    assert result.status is Status.PASSED, str(result)
    names = {f"output.prompt.{OPEN_TURNS[name][0]}.{name}" for name in OPEN_TURNS}
    assert refused(result).keys() == names | {f"output.image_tags.{len(info['image_tag_rewriting']) - 1}"}
    wrong = copy.deepcopy(info)
    wrong["prompts"][-1]["prompt"] += "!"
    assert len(failed(run_written(tmp_path, wrong))) == 1


def test_files_of_benchmarks_are_found_by_what_they_hold(tmp_path):
    names = {"a.jsonl": "given.jsonl", "q.jsonl": "asked.jsonl", "r.jsonl": "result.jsonl", "res/exp.jsonl": "x.jsonl"}
    names |= {"answers.jsonl": "b.jsonl", "testdev_balanced_questions.json": "questions.json", "ann.tsv": "dev.tsv"}
    for name in ("bench_pope", "bench_textvqa", "bench_scienceqa", "bench_gqa", "bench_seed", "bench_mmbench"):
        info = recorded(name)[0]
        for entry in info["runs"]:
            entry["files"] = {names.get(file, file): content for file, content in entry["files"].items()}
        result = run_written(tmp_path, info)
        assert result.status is Status.PASSED, str(result)


def test_recorded_runs_of_other_names_and_options_pass(tmp_path):
    info = recorded("bench_prompts")[0]
    for entry in info["runs"]:
        if entry["benchmark"] == "chunks":
            entry["benchmark"] = "GQA in parts"
            entry["extra_options"] = ["--chunk-idx", "1", "--num-chunks", "3"]
        elif entry["benchmark"] == "POPE missing image":
            entry["benchmark"] = "SEED missing image"
    result = run_written(tmp_path, info)
    assert result.status is Status.PASSED, str(result)
    entry["benchmark"], entry["extra_options"] = "VQAv2", ["--num-chunks", "4", "--chunk-idx", "0"]
    assert run_written(tmp_path, info).status is Status.FAILED
