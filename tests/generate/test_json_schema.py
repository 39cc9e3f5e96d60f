"""JSON schemas as people have them: what is taken, what answers come of it, where a fault lies."""

import json

import pytest
from pydantic import BaseModel

import edgevl
from edgevl import Constraint
from edgevl.errors import SchemaError

jsonschema = pytest.importorskip("jsonschema_rs", reason="comes with schemathesis")

A = {
    "type": "object",
    "properties": {"kind": {"const": "a", "default": "a"}, "n": {"type": "integer"}},
    "required": ["n"],
}
B = {
    "type": "object",
    "properties": {"kind": {"const": "b", "default": "b"}, "s": {"enum": ["x", "y"]}},
    "required": ["s"],
}
#: As Pydantic writes them: a union told apart by a field that has a default.
TAGGED = {
    "$defs": {"A": A, "B": B},
    "discriminator": {"mapping": {"a": "#/$defs/A", "b": "#/$defs/B"}, "propertyName": "kind"},
    "oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}],
}
#: A tree of them, which refers to itself.
TREE = {
    "$defs": {
        "Leaf": {
            "type": "object",
            "properties": {"kind": {"const": "leaf"}, "n": {"type": "integer"}},
            "required": ["kind", "n"],
        },
        "Pair": {
            "type": "object",
            "properties": {
                "kind": {"const": "pair"},
                "left": {
                    "discriminator": {"propertyName": "kind"},
                    "oneOf": [{"$ref": "#/$defs/Leaf"}, {"$ref": "#/$defs/Pair"}],
                },
            },
            "required": ["kind", "left"],
        },
    },
    "oneOf": [{"$ref": "#/$defs/Leaf"}, {"$ref": "#/$defs/Pair"}],
}
TAKEN = {
    "formats that are not known": {"enum": ["a"], "format": "color"},
    "a format of numbers": {"type": "integer", "minimum": 0, "format": "int64"},
    "formats that are": {"type": "string", "format": "date"},
    "items that may repeat": {"type": "array", "items": {"enum": [1]}, "maxItems": 3}
    | {"uniqueItems": False, "minContains": 1},
    "no constraint at all": {"enum": [1, 2], "if": {"const": 1}, "unevaluatedItems": True}
    | {"dependentRequired": {}, "not": False, "contains": {}, "minContains": 0},
    "annotations": {
        "$schema": "https://json-schema.org/draft-07/schema#",  # http: is its name
        "$id": "my schema",
        "$comment": "c",
        "title": "t",
        "description": "d",
        "default": 1,
        "examples": [1],
        "deprecated": True,
        "readOnly": True,
        "nullable": True,
        "type": "boolean",
    },
    "an unknown dialect": {"$schema": "https://example.org/mine", "type": "boolean"},
    "counts as floats": {"type": "array", "items": {"type": "null"}, "minItems": 2.0}
    | {"maxItems": 2.0},
    "a record of Zod's": {
        "type": "object",
        "propertyNames": {"type": "string"},
        "additionalProperties": {"type": "boolean"},
        "maxProperties": 2,
    },
    "all 64-bit integers": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    "unsigned ones": {"type": "integer", "minimum": 0, "maximum": 2**64 - 1, "format": "uint64"},
    "all doubles": {"type": "number", "minimum": -1.8e307, "maximum": 1.8e307},
    "one of two types": {"oneOf": [{"$ref": "#/$defs/A"}, {"type": "null"}], "$defs": {"A": A}},
    "a union by a tag": TAGGED,
    "a tree": TREE,
    "anything": True,
}


@pytest.fixture(scope="module")
def noise(mini_checkpoint):
    """A model of random weights: without a constraint it says anything."""
    return edgevl.load(mini_checkpoint("mini-qwen3"))


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_taken(noise, name):
    """Answers are of the schema as it was given, says another library."""
    schema = TAKEN[name]
    constraint = Constraint.json_schema(schema)
    known = {"$schema", "$id"} & schema.keys() if isinstance(schema, dict) else ()
    valid = jsonschema.validator_for(
        {key: value for key, value in schema.items() if key not in known} if known else schema,
        ignore_unknown_formats=True,
    )
    complete = 0
    for seed in range(4):
        answer = noise.ask("?", max_tokens=150, temperature=1, seed=seed, constraint=constraint)
        if answer.finish_reason == "stop":
            complete += 1
            valid.validate(json.loads(answer.text))
    assert complete or name in ("a tree", "anything")  # which may have no end


def test_the_tag_of_a_union_is_in_the_answer(noise):
    """Pydantic needs it, though its schema does not say so."""
    for seed in range(6):
        answer = noise.ask(
            "?", max_tokens=150, temperature=1, seed=seed, constraint=Constraint.json_schema(TAGGED)
        )
        assert json.loads(answer.text)["kind"] in ("a", "b")


def test_a_pydantic_model_comes_back(noise):
    """Its schema leaves open what more there is; the answer is what it names."""

    class Place(BaseModel):
        x: float
        y: float | None = None

    class Finding(BaseModel):
        sure: bool
        places: list[Place]

    constraint = Constraint.json_schema(Finding.model_json_schema())
    for seed in range(4):
        answer = noise.ask("?", max_tokens=600, temperature=1, seed=seed, constraint=constraint)
        if answer.finish_reason == "stop":
            said = json.loads(answer.text)
            assert Finding.model_validate(said).model_dump(exclude_unset=True) == said
            return
    pytest.fail("no answer came to its end")


def keys(noise, schema):
    """The first key that is no property's, or None if there can be none."""
    answer = noise.ask("?", max_tokens=60, constraint=Constraint.json_schema(schema))
    return answer.finish_reason, answer.text


@pytest.mark.parametrize(
    "more",
    [
        {"additionalProperties": True},
        {"patternProperties": {"^z": True}},
        {"minProperties": 1, "required": ["a"]},
        {"required": ["a", "z"]},
        {"allOf": [{"properties": {"z": True}, "required": ["z"]}]},
        {"$ref": "#/$defs/Z", "$defs": {"Z": {"properties": {"z": True}, "required": ["z"]}}},
    ],
)
def test_objects_stay_open_where_the_schema_says_so(more):
    """What is closed too early could not be met at all."""
    object_ = {"type": "object", "properties": {"a": {"type": "null"}}} | more
    matched = _accepts(object_, '{"a":null,"z":1}')
    assert matched
    assert not _accepts({"type": "object", "properties": {"a": True}}, '{"a":null,"z":1}')


def _accepts(schema, text):
    """Whether the grammar has the text, as bytes."""
    import llguidance

    matcher = llguidance.LLMatcher(
        llguidance.LLTokenizer("byte"), Constraint.json_schema(schema).grammar
    )
    return matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()


NESTED = {"type": "object", "properties": {"x": {"type": "array", "items": {"not": {}}}}}


@pytest.mark.parametrize(
    ("schema", "where"),
    [
        ({"type": "object", "properties": {"x": {"pattern": "(?=a)"}}}, ".properties.x.pattern"),
        (NESTED, ".properties.x.items.not"),
        ({"$ref": "#/$defs/N", "$defs": {"N": NESTED}}, ".$defs.N.properties.x.items.not"),
        ({"anyOf": [{"type": "string"}, {"if": {}, "then": {}}]}, ".anyOf[1].if"),
        ({"properties": {"a": {"type": "any"}}}, ".properties.a.type"),
        ({"properties": {"a": {"$ref": "#/$defs/none"}}}, ".properties.a.$ref"),
        ({"type": "array", "uniqueItems": True}, ".uniqueItems"),
        (
            {
                "type": "object",
                "properties": {"a": {"type": "integer", "minimum": 5, "maximum": 3}},
                "required": ["a"],
            },
            ".properties.a.minimum",
        ),
        # Whether an object is of one of these only, or of both, cannot be seen as it is written.
        ({"oneOf": [{"$ref": "#/$defs/A"}, {"type": "object"}], "$defs": {"A": A}}, ".oneOf"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, ".oneOf"),
        ({"oneOf": [{"enum": ["a", "b"]}, {"enum": ["b", "c"]}]}, ".oneOf"),
        (False, ".enum"),
    ],
)
def test_the_place_of_a_fault(schema, where):
    with pytest.raises(SchemaError) as error:
        Constraint.json_schema(schema, "response_format.schema")
    assert error.value.where == f"response_format.schema{where}"
    assert str(error.value).startswith(f"response_format.schema{where}: ")
    assert "\n" not in str(error.value)


def test_faults_are_searched_for_a_second_only():
    slow = {f"p{i}": {"type": "string", "pattern": "^[a-z]{3}$"} for i in range(1500)}
    with pytest.raises(SchemaError, match="not"):
        Constraint.json_schema({"type": "object", "properties": slow | {"last": {"not": {}}}})


def test_unions_of_many_are_compared_within_bounds():
    """Alternatives that refer to each other in every property would take for ever."""
    names = [f"p{i}" for i in range(300)]
    one = {"type": "object", "properties": {n: {"$ref": "#/$defs/B"} for n in names}}
    other = {"type": "object", "properties": {n: {"$ref": "#/$defs/A"} for n in names}}
    defs = {"A": one | {"required": names}, "B": other | {"required": names}}
    with pytest.raises(SchemaError):
        Constraint.json_schema(
            {"$defs": defs, "oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}]}
        )
