"""The services' OpenAPI documents: what is wrong in one, and the forms of it that calls are made up from."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jsonschema_rs
import schemathesis

Document = dict[str, Any]

METHODS = frozenset({"get", "put", "post", "delete", "options", "head", "patch", "trace"})
# OpenAPI cannot say that parameters, or the query and the body, exclude each other. So a path is called as documented,
# and once more in each of these forms, which may be refused for no such reason: the parameters taken, and the body.
FORMS: Mapping[str, Sequence[tuple[frozenset[str], bool]]] = {
    "/place_order/": (
        (frozenset({"currency", "amount", "client_order_id", "reference"}), False),
        (frozenset[str](), True),
    ),
    "/get_orders/": tuple(
        (frozenset(names), False)
        for names in (("start", "page_size"), ("before", "page_size"), ("after", "page_size"), ("client_order_id",))
    ),
}


def faults(document: Document) -> Iterator[str]:
    """What is wrong in a document: it is not of OpenAPI 3.1, or an example in it does not fit its own schema."""
    try:
        schemathesis.openapi.from_dict(document).validate()
    except jsonschema_rs.ValidationError as error:
        yield f"is not valid OpenAPI: {error.message} at {error.instance_path}"
    for place, schema, example in _examples(document, ""):
        # A reference in the schema begins at the document.
        validator = jsonschema_rs.Draft202012Validator(
            {**schema, "components": document.get("components", {})}, validate_formats=True
        )
        for wrong in validator.iter_errors(example):
            yield f"{place}: the example does not fit its schema: {wrong.message}"


def _examples(node: object, place: str) -> Iterator[tuple[str, Document, object]]:
    """Every example that stands beside or in a schema: where, the schema, and the example."""
    if isinstance(node, list):
        for index, each in enumerate(node):
            yield from _examples(each, f"{place}/{index}")
    if not isinstance(node, dict):
        return
    if isinstance(schema := node.get("schema"), dict):
        given = [node["example"]] if "example" in node else []
        named = node.get("examples", {})
        given += [each["value"] for each in named.values()] + schema.get("examples", [])
        given += [schema["default"]] if "default" in schema else []
        yield from ((place, schema, example) for example in given)
    for name, each in node.items():
        if name not in ("example", "examples", "schema"):
            yield from _examples(each, f"{place}/{name}")


def operations(document: Document) -> Iterator[tuple[str, Document]]:
    """The operations, by the names that schemathesis gives them: `GET /get_orders/`."""
    for path, item in document["paths"].items():
        for method in item.keys() & METHODS:
            yield f"{method.upper()} {path}", item[method]


def forms(document: Document) -> Iterator[Document]:
    """The document, and one of a single path for each of its FORMS."""
    yield document
    for path in document["paths"].keys() & FORMS.keys():
        for names, has_body in FORMS[path]:
            item = copy.deepcopy(document["paths"][path])
            for operation in item.values():
                operation["parameters"] = [each for each in operation["parameters"] if each["name"] in names]
                for each in operation["parameters"]:
                    # As many as there are in the form are needed: none would be another request.
                    each["required"] = each["name"] in ("currency", "amount")
                operation.get("requestBody", {})["required"] = True
                if not has_body:
                    operation.pop("requestBody", None)
            yield {**document, "paths": {path: item}}


def only_guarded(document: Document) -> Document:
    """The document with those paths only that have an operation which needs the token."""
    paths = document["paths"].items()
    return {
        **document,
        "paths": {path: item for path, item in paths if any("security" in operation for operation in item.values())},
    }


def for_anybody(document: Document) -> Document:
    """The document without the parameter that whoever calls without a key has no scope for: each call with it would be
    refused."""
    document = copy.deepcopy(document)
    for _, operation in operations(document):
        if "security" not in operation and "parameters" in operation:
            operation["parameters"] = [each for each in operation["parameters"] if each["name"] != "client"]
    return document


def with_examples(document: Document, parameters: Mapping[str, str], bodies: Mapping[str, object]) -> Document:
    """The document with these examples: of parameters by name, and of bodies by operation. What they name is there."""
    document = copy.deepcopy(document)
    for name, operation in operations(document):
        if name.startswith("DELETE "):  # of what the documentation's own examples make
            continue
        for parameter in operation.get("parameters", ()):
            # What stands in the query of another method makes something, and is there already.
            if parameter["name"] in parameters and (name.startswith("GET ") or parameter["in"] == "path"):
                parameter["example"] = parameters[parameter["name"]]
        if name in bodies:
            operation["requestBody"]["content"]["application/json"]["example"] = bodies[name]
    return document
