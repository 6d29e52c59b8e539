"""The small language model: a tokenizer that reads everything, and weights that transformers loads."""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llava_piip.demo import language
from llava_piip.demo.dataset import imagine_conversations


def test_words_of_the_demo_are_single_tokens_and_any_text_comes_back(language_model):
    tokenizer = AutoTokenizer.from_pretrained(language_model[0])
    for word in (" red", " p", " digits", " colour", " bottom", " 7", " 12"):
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1, word
    for text in ("Wo ist die Sieben?", "7️⃣ plus 七", "tabs\tand\n\nlines"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_ten_updates_learn_something_and_are_saved(language_model):
    folder, loss = language_model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    unseen = imagine_conversations(64, seed=1)
    samples = [language._encode(tokenizer, messages) for messages in unseen]
    with torch.inference_mode():
        found = model(**language.Collator(tokenizer.pad_token_id)(samples)).loss
    uniform = torch.tensor(float(len(tokenizer))).log()
    assert found < 0.7 * uniform and loss < uniform
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model"]
