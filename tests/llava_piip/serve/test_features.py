"""The table of visual tokens: who has a place, who waits for one, and ids that are never given twice."""

import asyncio

import pytest
import torch
from torch import nn

from llava_piip.serve.features import FeatureTable
from piip_core.errors import ConfigError

LENGTH, FIRST = 3, 100


def table(places=2, first_id=FIRST):
    torch.manual_seed(0)
    return FeatureTable(nn.Embedding(10, 4), places=places, length=LENGTH, first_id=first_id)


def test_rows_by_ids():
    async def main():
        features, embedding = table(), nn.Embedding(10, 4)
        tokens = {key: torch.randn(LENGTH, 4) for key in (b"a", b"b", b"c")}
        for keys in ([b"a", b"b"], [b"c"], [b"b", b"c"], [b"a"]):  # each takes the place of another
            async with features.use(keys) as pictures:
                for picture in pictures:
                    if not picture.ready:
                        features.write(picture, tokens[picture.key])
                ids = [1, *pictures[0].ids, 2, *pictures[-1].ids[1:]]
                found = features.embed(embedding, torch.tensor([ids], dtype=torch.int32))
                words = [embedding.weight[[number]] for number in (1, 2)]
                parts = [words[0], tokens[keys[0]], words[1], tokens[keys[-1]][1:]]
                assert torch.equal(found[0], torch.cat(parts))

    asyncio.run(main())


def test_same_picture_is_kept_and_the_least_recently_used_one_goes():
    async def main():
        features, ids = table(), {}
        for key in (b"a", b"b", b"a", b"c", b"a", b"b"):
            async with features.use([key, key]) as pictures:
                assert pictures[0] is pictures[1]
                ids.setdefault(key, []).append(pictures[0].ids)
        assert ids[b"a"][0] == ids[b"a"][1] == ids[b"a"][2]  # b went for c, then c for b
        assert ids[b"b"][0] != ids[b"b"][1]
        given = [number for found in ids.values() for span in set(found) for number in span]
        assert len(given) == len(set(given)) == 4 * LENGTH and min(given) >= FIRST

    asyncio.run(main())


def test_ids_fit_into_32_bits_for_ever():
    async def main():
        first_id = 2**31 - 1 - 5 * 2 * LENGTH  # five rounds
        features, spans = table(first_id=first_id), []
        for number in range(40):
            async with features.use([bytes([number])]) as pictures:
                spans.append(pictures[0].ids)
        assert all(first_id <= span.start and span.stop <= 2**31 - 1 for span in spans)
        assert len(set(spans[:10])) == 10 and set(spans) == set(spans[:10])

    asyncio.run(main())
    with pytest.raises(ConfigError, match="image_places=2"):
        table(first_id=2**31 - 8)


def test_waits_in_turn_for_room():
    async def main():
        features, order = table(), []

        async def use(keys, seconds):
            async with features.use(keys) as pictures:
                order.append(keys)
                assert sum(picture.users > 0 for picture in features._pictures.values()) <= 2
                await asyncio.sleep(seconds)
                return pictures

        asked = [[b"a"], [b"b", b"c"], [b"d"], [b"a", b"d"], [b"b", b"b"]]
        tasks = [asyncio.ensure_future(use(keys, 0.01)) for keys in asked]
        stuck = asyncio.ensure_future(use([b"e", b"f"], 0))
        await asyncio.sleep(0)
        stuck.cancel()
        await asyncio.wait_for(asyncio.gather(*tasks), 60)
        assert order == asked and not any(picture.users for picture in features._pictures.values())
        with pytest.raises(ValueError, match="3 pictures"):
            await use([b"a", b"b", b"c"], 0)

    asyncio.run(main())
