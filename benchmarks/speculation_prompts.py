"""Questions for `speculation.py`, by how much of the answer stands in the prompt."""

from typing import Any

_LETTER = """\
Dear Mrs Holloway,

thank you for your leter of the 3rd of March. We have recieved the two boxes that you sent us, \
but one of the glasses was brocken when we opened it. The others are in good condition, and we \
are very pleased with there quality. Could you please send us a new glass, or give us the money \
back? We would also like to order twelve more glases of the same kind, and six plates in blue. \
Please tell us how much the delivery to our adress in Bristol will cost, and when we can expect \
it. Our shop is open from Monday to Friday between nine and five, and on Saturday untill noon.

Yours sincerely,
Peter Ashworth"""

_CODE = """\
def read_table(path, separator=","):
    rows = []
    with open(path) as file:
        for line in file:
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            cells = [cell.strip() for cell in line.split(separator)]
            rows.append(cells)
    header = rows[0]
    result = []
    for cells in rows[1:]:
        if len(cells) != len(header):
            raise ValueError(f"expected {len(header)} cells, found {len(cells)}")
        result.append(dict(zip(header, cells)))
    return result"""

_NOTES = """\
The meeting begins at 10 o'clock in room 214. Anna presents the results of the survey, which 480 \
customers answered. Most of them like the new website, but a third of them find the prices hard \
to read. Tom explains why the delivery of the spare parts takes two weeks and what can be done \
about it. Maria asks for a second printer, since the old one is often broken. The budget for next \
year is discussed at the end. The next meeting is on the 12th of May in the same room."""

_RECEIPT = """\
GREEN VALLEY MARKET
214 Station Road, Leeds
Date: 14/03/2024   Time: 17:42
Cashier: Susan   Till: 03

Whole milk 2 l         2.35
Brown bread            1.80
Bananas 1.2 kg         1.44
Cheddar cheese 400 g   4.10
Tomatoes 500 g         1.95
Orange juice 1 l       2.60
Coffee 250 g           5.25

Subtotal              19.49
VAT 5 %                0.97
TOTAL                 20.46
Card **** 4821        20.46
Thank you for your visit!"""

_TABLE = """\
| City | Country | Population | Area in km2 | Founded |
|---|---|---|---|---|
| Lisbon | Portugal | 545923 | 100.1 | 1200 BC |
| Vienna | Austria | 1982097 | 414.8 | 15 BC |
| Oslo | Norway | 709037 | 454.1 | 1040 |
| Prague | Czechia | 1357326 | 496.2 | 870 |
| Dublin | Ireland | 592713 | 117.8 | 841 |
| Warsaw | Poland | 1863056 | 517.2 | 1300 |"""

_NEWS = """\
On Tuesday evening Margaret Whitfield opened the new library in Ashford together with the \
architect Daniel Okafor. The building cost 12.4 million pounds and took three years. Among the \
guests were the writer Eleanor Marsh, who read from her novel, the teacher Samuel Brightwater, \
and the pianist Naoko Tanaka. The mayor, Thomas Pemberton, thanked the builders and promised that \
the library would stay open on Sundays. The first book was borrowed by nine-year-old Lucy \
Fairweather."""

_TILL = """\
HARBOUR BOOKS
7 Quay Street, Bristol BS1 4UB
02/11/2023 11:05    Served by: Omar    Till 01
1 The Tides of Spring        8.99
1 Atlas of Small Islands    24.50
2 Pencil HB                  1.60
TOTAL GBP                   35.09
VISA **** 0937              35.09"""

_TICKET = """\
CITY PARKING - STATION GARAGE
Entry 19.06.2024 08:12  Exit 19.06.2024 17:40
Ticket no. 558201  Rate: day, 14.00 EUR
Paid in cash: 20.00  Change: 6.00"""


def _fields(**types: Any) -> dict[str, Any]:
    """Return the schema of an object with these fields, of types by their names or schemas."""
    properties = {
        name: {"type": kind} if isinstance(kind, str) else kind for name, kind in types.items()
    }
    return {"type": "object", "properties": properties, "required": list(properties)}


_ITEMS = {"type": "array", "items": _fields(name="string", price="number"), "maxItems": 9}
_SHOPPING = _fields(
    merchant="string", address="string", date="string", time="string", cashier="string",
    items=_ITEMS, currency={"enum": ["GBP", "EUR", "USD"]}, total="number",
    payment_method={"enum": ["cash", "card"]}, card_last_digits="string",
)  # fmt: skip
_PARKING = _fields(
    operator="string", ticket_number="string", entry_time="string", exit_time="string",
    rate="string", price="number", amount_paid="number", change_given="number",
)  # fmt: skip

_EXTRACT = "Extract the fields of this receipt as JSON:\n\n"
#: Forms that answers must have, by their questions.
SCHEMAS = {
    f"{_EXTRACT}{_RECEIPT}": _SHOPPING,
    f"{_EXTRACT}{_TILL}": _SHOPPING,
    f"{_EXTRACT}{_TICKET}": _PARKING,
}

#: Questions by kind, without pictures: what a picture shows stands in the prompt as text.
PROMPTS = {
    "editing": [
        f"Correct the spelling mistakes in this letter and repeat the whole letter:\n\n{_LETTER}",
        "Rename the variable `rows` to `table` in this function and repeat the whole function:\n\n"
        f"{_CODE}",
        f"Add a docstring to this function and write the whole function again:\n\n{_CODE}",
        f"Rewrite this text in the past tense:\n\n{_NOTES}",
    ],
    "copying": [
        f"Copy the following receipt exactly as it is:\n\n{_RECEIPT}",
        f"Repeat this table exactly as it is:\n\n{_TABLE}",
        f"List the names of all people in this text:\n\n{_NEWS}",
        f"Copy this text exactly:\n\n{_NEWS}",
    ],
    "extraction": list(SCHEMAS),
    "chat": [
        "Write a short story about a lighthouse keeper who finds a letter.",
        "Why is the sky blue in the daytime and red in the evening?",
        "What should I think of when I plan a week of hiking in the mountains?",
        "Explain to a child how a bicycle stays upright.",
    ],
}
