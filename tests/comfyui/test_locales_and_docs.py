"""What a user reads about the nodes, in two languages: complete, and true to the schemas and to the messages of the code."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from distilled_t5.devtools.comfyui.server import link_folder
from distilled_t5.devtools.docs.build_locales import MESSAGE_SYNTAX, flat, locale_path, pack_nodes, plain_messages, schema_texts

LANGUAGES = ("en", "zh")
CHINESE = re.compile(r"[\u4e00-\u9fff]")
# Words that the Chinese interface leaves as they are.
SAME_IN_CHINESE = {"CLIP"}
ERRORS_HEADING = {"en": "## Errors", "zh": "## \u9519\u8bef\u4fe1\u606f"}


@pytest.fixture(scope="module")
def texts() -> dict[str, Any]:
    return schema_texts(pack_nodes())


def locale(language: str) -> dict[str, Any]:
    return json.loads(locale_path(language).read_text(encoding="utf-8"))


def pages(pack_root: Path, language: str, texts: dict[str, Any]) -> dict[str, str]:
    return {node_id: (pack_root / "web" / "docs" / node_id / f"{language}.md").read_text(encoding="utf-8") for node_id in texts}


def quoted_messages(page: str, language: str) -> list[str]:
    _, errors = page.split(ERRORS_HEADING[language])
    return re.findall(r"^- `(.+?)`", errors, re.MULTILINE)


def strings_of(source: Path) -> str:
    found = [node.value for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))) if isinstance(node, ast.Constant)]
    return "\0".join(text for text in found if isinstance(text, str))


def test_every_text_of_every_node_is_filled_in(texts: dict[str, Any]) -> None:
    empty = [key for key, text in flat(texts).items() if not text or not text.strip()]
    assert len(texts) >= 3
    assert empty == []


def test_the_english_file_is_what_the_schemas_say(texts: dict[str, Any]) -> None:
    assert locale("en") == plain_messages(texts), "run python -m distilled_t5.devtools.docs.build_locales"


def test_the_chinese_file_has_every_key_of_the_schemas_and_no_other(texts: dict[str, Any]) -> None:
    assert flat(locale("zh")).keys() == flat(texts).keys()


def test_the_chinese_file_is_in_chinese() -> None:
    left = {key: text for key, text in flat(locale("zh")).items() if not CHINESE.search(text) and text not in SAME_IN_CHINESE}
    assert left == {}


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_translation_holds_characters_that_the_frontend_would_interpret(language: str) -> None:
    assert {key: text for key, text in flat(locale(language)).items() if MESSAGE_SYNTAX.search(text)} == {}


@pytest.mark.parametrize("language", LANGUAGES)
def test_comfyui_serves_the_translations(language: str, pack_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import folder_paths
    from app.custom_node_manager import CustomNodeManager

    link_folder(tmp_path / "distilled-t5", pack_root)
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda _kind: [str(tmp_path)])
    assert CustomNodeManager().build_translations()[language] == {"nodeDefs": locale(language)}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_help_page_describes_every_input_and_output(language: str, pack_root: Path, texts: dict[str, Any]) -> None:
    for node_id, page in pages(pack_root, language, texts).items():
        described = re.findall(r"^- \*\*(\w+)\*\*", page, re.MULTILINE)
        outputs = [slot["name"] for slot in texts[node_id]["outputs"].values()]
        assert described == [*texts[node_id]["inputs"], *outputs], f"{node_id}/{language}.md"


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_help_page_carries_the_name_of_its_node(language: str, pack_root: Path, texts: dict[str, Any]) -> None:
    for node_id, page in pages(pack_root, language, texts).items():
        assert page.splitlines()[0] == "# " + locale(language)[node_id]["display_name"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_error_in_a_help_page_is_one_that_the_code_raises(language: str, pack_root: Path, texts: dict[str, Any]) -> None:
    folders = [pack_root / name for name in ("runtime", "prompts", "students", "encoder", "nodes", "evaluate", "train")]
    raised = "\0".join(strings_of(path) for folder in folders for path in sorted(folder.rglob("*.py")))
    for node_id, page in pages(pack_root, language, texts).items():
        messages = quoted_messages(page, language)
        unknown = [part for message in messages for part in message.split("\u2026") if part.strip(" ,") and part not in raised]
        assert len(messages) >= 3, f"{node_id}/{language}.md"
        assert unknown == [], f"{node_id}/{language}.md quotes what no message says"


def test_both_languages_explain_the_same_errors(pack_root: Path, texts: dict[str, Any]) -> None:
    english, chinese = pages(pack_root, "en", texts), pages(pack_root, "zh", texts)
    assert {node: quoted_messages(page, "en") for node, page in english.items()} == {
        node: quoted_messages(page, "zh") for node, page in chinese.items()
    }
