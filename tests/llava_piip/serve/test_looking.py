"""What the branches looked at, for the panel of the web page."""

import pytest

from llava_piip.inference import ChatModel
from llava_piip.serve.looking import look
from llava_piip.serve.web_session import WebChat
from piip_core.errors import UserError

SETTINGS = {"max_new_tokens": 8, "temperature": 0.0, "top_p": 1.0}


def answer_of(web, visitor, file):
    return list(web.ask(visitor, "Well?", [file], SETTINGS))[-1].messages[-1]["content"][-1]["text"]


def test_look_draws_branches_and_leaves_the_model_as_it_was(tiny_chat, files):
    web = WebChat(tiny_chat)
    visitor = web.session()
    before = answer_of(web, visitor, files[0])
    middle, corner = (web.look(visitor, 1, at=place, depth=1.0) for place in (None, (0, 0)))
    (attention, sampling), (other, _) = middle, corner
    assert attention.width > 2 * attention.height  # the image and two branches
    assert sampling is not None and attention.tobytes() != other.tobytes()
    assert attention.tobytes() != web.look(visitor, 1, at=None, depth=0.0)[0].tobytes()
    assert answer_of(web, web.session(), files[0]) == before
    for number, options, expected in (
        (2, {"at": None, "depth": 0.5}, "image 2: the conversation has 1"),
        (1, {"at": (64, 0), "depth": 0.5}, "outside of the image of 64 x 64"),
        (1, {"at": None, "depth": 1.5}, "depth=1.5: expected 0 to 1"),
    ):
        with pytest.raises(UserError, match=expected):
            web.look(visitor, number, **options)


def test_look_takes_models_in_bfloat16(model_folder, pictures):
    assert look(ChatModel.load(model_folder, device="cpu"), pictures[0])[0].width > 0
