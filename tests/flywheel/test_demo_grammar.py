"""The generated workload: varied, repeatable, and with answers that can be read from the text."""

import itertools
import re

from flywheel.demo import corpus, grammar


def test_every_template_occurs_once() -> None:
    """So no split can put one template on both sides."""
    items = grammar.generate(1_500, 7).items

    assert len(items) == 1_500
    assert len({item.template.casefold() for item in items}) == 1_500


def test_there_are_thousands_of_utterances() -> None:
    """The demo needs more traffic than it trains on."""
    assert len({item.text.casefold() for item in grammar.generate(5_000, 7).items}) == 5_000


def test_equal_seeds_give_equal_workloads() -> None:
    """Seeds are reported; a run can be repeated from them."""
    assert grammar.generate(100, 3) == grammar.generate(100, 3)
    assert grammar.generate(100, 3).items != grammar.generate(100, 4).items


def test_a_larger_workload_holds_the_smaller_one() -> None:
    """The stand-in knows the answers to any traffic of its seed, however long it is."""
    larger = {item.text: item for item in grammar.generate(900, 5).items}

    assert all(larger[item.text] == item for item in grammar.generate(120, 5).items)


def test_eight_tools_share_the_items_evenly() -> None:
    """Each tool is seen about as often as any other."""
    workload = grammar.generate(800, 7)
    names = [tool["function"]["name"] for tool in workload.tools]

    assert len(names) == 8
    assert {name: sum(item.tool == name for item in workload.items) for name in names} == dict.fromkeys(names, 100)


def test_arguments_stand_in_the_text_and_not_in_the_template() -> None:
    """An argument's value is copied from the text, and its name is one of the tool's."""
    workload = grammar.generate(400, 11)
    required = {t["function"]["name"]: t["function"]["parameters"]["required"] for t in workload.tools}

    for item in workload.items:
        assert list(item.arguments) == required[item.tool]
        for name, value in item.arguments.items():
            assert value in item.text
            assert f"{{{name}}}" in item.template


def test_patterns_expand_without_leftovers() -> None:
    """No bracket, bar or double space reaches an utterance."""
    assert not [item.text for item in grammar.generate(2_000, 1).items if re.search(r"[\[\]|{}]|  ", item.text)]


def test_the_pretraining_text_is_about_other_things() -> None:
    """No tool and no utterance of the measured workload is in the corpus of the base model."""
    workload = grammar.generate(3_000, 7)
    rows = list(itertools.islice(corpus.conversations(7), 3_000))
    tools = {tool["function"]["name"] for row in rows for tool in row["tools"]}
    texts = {row["messages"][1]["content"].casefold() for row in rows}

    assert tools.isdisjoint(tool["function"]["name"] for tool in workload.tools)
    assert texts.isdisjoint(item.text.casefold() for item in workload.items)
