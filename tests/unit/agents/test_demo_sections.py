"""How the documentation is cut into the sections that the demo agent searches."""

import pytest

from context_server.agents.demo import Documentation, split_sections


def titles_and_bodies(markdown: str) -> list[tuple[str, str]]:
    return [(section.title, section.body) for section in split_sections(markdown, "docs/page.md")]


def test_headings_part_a_document_and_its_first_one_names_it():
    sections = split_sections("# Page\nIntro.\n## One ##\nText.\n### `Two` **bold**\nMore.\n", "docs/page.md")
    assert [(section.title, section.body) for section in sections] == [
        ("Page", "Intro."),
        ("One", "Text."),
        ("Two bold", "More."),
    ]
    assert {section.document for section in sections} == {"Page"}


@pytest.mark.parametrize(
    "code",
    [
        "```sh\n# comment\n```",
        "~~~\n# comment\n```\n# still code\n~~~",
        "````md\n```\n# nested\n```\n# still code\n````",
        "   ```\n# comment\n   ```   ",
        "```\n# never closed",
        "```\n# comment\n```sh\n# still code\n```",
        "    # indented code",
    ],
)
def test_a_heading_in_code_is_code(code):
    assert titles_and_bodies(f"# Page\nBefore.\n\n{code}") == [("Page", f"Before.\n\n{code}".rstrip())]


def test_inline_code_opens_no_fence():
    assert titles_and_bodies("```not a fence```\n# Page\nText.") == [("Page", "```not a fence```"), ("Page", "Text.")]


def test_what_looks_like_a_heading_and_is_none_stays_text():
    assert titles_and_bodies("# Page\n#hashtag\n####### seven") == [("Page", "#hashtag\n####### seven")]


def test_sections_without_text_are_left_out_and_a_nameless_page_is_called_by_its_file():
    assert titles_and_bodies("# Page\n\n## Empty\n\n## Full\nText.") == [("Full", "Text.")]
    assert titles_and_bodies("Just text.\n#\nMore.") == [("page", "Just text."), ("page", "More.")]
    assert titles_and_bodies("") == []


def test_a_comment_for_machines_goes_and_one_in_code_stays():
    markdown = "# Page\n<!-- test -->\nText.\n```html\n<!-- kept -->\n```"
    assert titles_and_bodies(markdown) == [("Page", "Text.\n```html\n<!-- kept -->\n```")]


def test_a_word_in_the_title_weighs_more_than_one_in_the_text(tmp_path):
    (tmp_path / "a.md").write_text("# A\n## First\nA lease ends.\n## Lease\nOwnership ends.", encoding="utf-8")
    assert [hit.section.title for hit in Documentation(tmp_path).search(["lease"])] == ["Lease", "First"]
