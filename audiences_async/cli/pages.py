"""``audiences help``: the pages that come with the package."""

import sys
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Final

from rich.console import Console

from audiences_async.errors import ConfigurationError

_FOLDER: Final = files("audiences_async") / "help"


def topics() -> dict[str, str]:
    """Return the title of each page, by its topic, in alphabetical order."""
    return dict(sorted((page.name.removesuffix(".md"), _title(page)) for page in _FOLDER.iterdir()))


def _title(page: Traversable) -> str:
    return page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def show(topic: str | None) -> None:
    """Print a page, formatted on a terminal and as it is elsewhere; without a topic, list the pages.

    Raises:
        ConfigurationError: There is no such page.
    """
    titles = topics()
    if topic is None:
        width = max(map(len, titles))
        sys.stdout.write("".join(f"{name:{width}}  {title}\n" for name, title in titles.items()))
        return
    if topic not in titles:
        raise ConfigurationError(f"no page {topic!r}; the pages are {', '.join(titles)}")
    text = (_FOLDER / f"{topic}.md").read_text(encoding="utf-8")
    console = Console()
    if console.is_terminal:
        from rich.markdown import Markdown  # noqa: PLC0415 - which no other command needs to wait for

        console.print(Markdown(text))
    else:
        sys.stdout.write(text)
