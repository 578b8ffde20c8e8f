"""What the site does beyond Markdown: notebooks as pages, links into the repository, references in docstrings.

mkdocs calls the functions ``on_*``; griffe, which reads the docstrings, makes the extension.
"""

from __future__ import annotations

import base64
import json
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
log = get_plugin_logger("hooks")

# <!-- include FILE NAME -->: what stands between <!-- NAME --> and <!-- /NAME --> there; without NAME all of it
INCLUDE = re.compile(r"<!-- include (\S+)(?: (\S+))? -->")
LINK = re.compile(r"\]\((?!#|[a-z]+:)([^)#\s]+)(#[^)]*)?\)")
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`~?([^`]+)`")


def on_files(files: Any, config: Any) -> Any:
    """Each notebook becomes a page of its name; the notebook itself stays to be downloaded."""
    for source in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        text, pictures = notebook_page(json.loads(source.read_text(encoding="utf-8")), source.stem)
        files.append(File.generated(config, f"notebooks/{source.stem}.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def notebook_page(notebook: dict[str, Any], stem: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and the pictures it shows by name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(source)
            if len(parts) == 1:  # under the title
                parts.append(f"[This notebook]({stem}.ipynb), with the output of its last execution.")
        elif cell["cell_type"] == "code" and source:
            parts.append(f"```python\n{source}\n```")
            printed = ""
            shown: list[str] = []
            for output in cell["outputs"]:
                data = output.get("data", {})
                if picture := data.get("image/png"):
                    name = f"{stem}-{len(pictures)}.png"
                    pictures[name] = base64.b64decode("".join(picture))
                    shown.append(f"![output of the code above]({name})")
                else:
                    printed += "".join(output.get("text", data.get("text/plain", "")))
            if text := printed.strip("\n"):
                parts.append(f"```{{ .text .output }}\n{text}\n```")
            parts += shown
    return "\n\n".join(parts) + "\n", pictures


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Includes parts of files above docs/. Links that leave docs/ go to the repository, where their file must exist."""
    folder = posixpath.dirname(page.file.src_uri)

    def include(match: re.Match[str]) -> str:
        text = (ROOT / match[1]).read_text(encoding="utf-8")
        if match[2] is not None:
            text = text.split(f"<!-- {match[2]} -->")[1].split(f"<!-- /{match[2]} -->")[0]
        return LINK.sub(lambda link: f"]({posixpath.relpath(link[1], 'docs')}{link[2] or ''})", text).strip()

    markdown = INCLUDE.sub(include, markdown)

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join("docs", folder, match[1]))
        if target.startswith("docs/"):
            page_of = match[0].replace(".ipynb", ".md")  # a notebook's page; the page itself links to the file
            return match[0] if folder == "notebooks" else page_of
        if not (ROOT / target).exists():
            log.warning("%s links to %s, which does not exist", page.file.src_uri, target)
        return f"]({config.repo_url}/blob/main/{target}{match[2] or ''})"

    return LINK.sub(link, markdown)


class References(griffe.Extension):
    """:class:`x` and its like become links where the site describes x; an "Example:" is a section of examples."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = ROLE.sub(reference, text)


def reference(match: re.Match[str]) -> str:
    name = match[1]
    if "." not in name:
        return f"`{name}`"
    return f'<autoref optional identifier="{name}"><code>{name}</code></autoref>'
