"""The page at /docs: the OpenAPI description as plain HTML, which needs no script and nothing from elsewhere."""

import json
from html import escape
from typing import Any


def page(description: dict[str, Any]) -> str:
    """HTML of an OpenAPI description: each operation with what it takes, then the fields of each body."""
    info, parts = description["info"], []
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            reference = content.get("schema", {}).get("$ref", "").rpartition("/")[2]
            body = f'<p>Body: <a href="#{escape(reference)}">{escape(reference)}</a></p>' if reference else ""
            parts.append(
                f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
                f"<p>{escape(operation.get('description') or operation.get('summary', ''))}</p>{body}"
            )
    for name, schema in description.get("components", {}).get("schemas", {}).items():
        if "properties" not in schema:
            continue
        needed = schema.get("required", [])
        rows = "".join(
            f"<tr><td><code>{escape(key)}</code>{' (needed)' if key in needed else ''}</td>"
            f"<td>{escape(_kind(field))}</td><td>{escape(_default(field))}</td>"
            f"<td>{escape(field.get('description', ''))}</td></tr>"
            for key, field in schema["properties"].items()
        )
        parts.append(
            f'<h2 id="{escape(name)}">{escape(name)}</h2><table><thead><tr><th>field</th><th>type</th>'
            f"<th>default</th><th>meaning</th></tr></thead><tbody>{rows}</tbody></table>"
        )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(info["title"])}</title>'
        '<link rel="icon" href="/page/icon.svg" type="image/svg+xml">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="stylesheet" href="/page/page.css"><main><h1>{escape(info["title"])} {escape(info["version"])}</h1>'
        f'<p>{escape(info.get("description", ""))} The same as JSON: <a href="/openapi.json">/openapi.json</a>.</p>'
        f"{''.join(parts)}</main></html>"
    )


def _kind(field: dict[str, Any]) -> str:
    """A field's type and limits in words."""
    if "anyOf" in field:
        return " or ".join(_kind(part) for part in field["anyOf"])
    if "$ref" in field:
        return field["$ref"].rpartition("/")[2]
    if field.get("type") == "array":
        return f"list of {_kind(field['items'])}"
    names = {"minimum": "≥", "maximum": "≤", "exclusiveMinimum": ">", "exclusiveMaximum": "<", "maxLength": "length ≤"}
    limits = [f"{sign} {field[key]:g}" for key, sign in names.items() if key in field]
    return ", ".join([field.get("type", "any"), *limits])


def _default(field: dict[str, Any]) -> str:
    return json.dumps(field["default"]) if field.get("default") is not None else ""
