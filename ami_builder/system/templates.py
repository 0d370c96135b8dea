"""Jinja templates for shell, YAML and units; an error names the template and its line."""

import traceback
from pathlib import Path

import jinja2

from ami_builder.core.errors import UsageError


def environment(folder: Path) -> jinja2.Environment:
    """Return an environment for the templates in a folder; an undefined name is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - shell, YAML and units, not HTML
    )


def render(environment: jinja2.Environment, name: str, **values: object) -> str:
    """Return a rendered template. Raises UsageError with the template's name and line."""
    try:
        return environment.get_template(name).render(values)
    except jinja2.TemplateSyntaxError as wrong:
        raise UsageError(f"{wrong.name or name}, line {wrong.lineno}: {wrong.message}") from wrong
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, AttributeError) as wrong:
        raise UsageError(f"{name}, line {_line(wrong, name)}: {wrong}") from wrong


def _line(wrong: BaseException, name: str) -> int | str:
    """Return the line of template `name` that raised: Jinja's tracebacks have the template's own lines."""
    frames = [f for f in traceback.extract_tb(wrong.__traceback__) if f.filename.endswith(f"/{name}")]
    return (frames[-1].lineno if frames else None) or "?"
