# SPDX-License-Identifier: Apache-2.0
"""Malformed data and the exact line that each gets: place, cause, what to do.

An expectation follows the file's path; * stands for another library's words.
"""

# fmt: off
import datetime
import decimal
import gzip
import io
import json
import pathlib
import re
from typing import Any

import pytest

from jft import errors
from jft.data import examples, formats

Reading = formats.Reading
Case = tuple[Any, ...]  # file, content, the line, and a Reading where it is not the default

GOOD = {"prompt": "p", "response": "r"}
USER, BOT = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}
HUMAN, GPT = {"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def chat(*turns: object) -> str:
    """A good conversation and one of these turns."""
    return jsonl({"messages": [USER, BOT]}, {"messages": turns})


def parquet(**columns: list[Any]) -> bytes:
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), out)
    return out.getvalue()


FILES: list[Case] = [
    ("a.jsonl", b"",
     "holds no rows (0 bytes); fill it or leave it out"),
    ("a.jsonl", b"\n \r\n",
     "holds no rows (4 bytes); fill it or leave it out"),
    ("a.csv", b"prompt,response\n",
     "holds no rows (16 bytes); fill it or leave it out"),
    ("a.json", b"[]",
     "holds no rows (2 bytes); fill it or leave it out"),
    ("a.txt", b"",
     "holds no rows (0 bytes); fill it or leave it out"),
    ("a.jsonl", jsonl(GOOD).encode("utf-16"),
     "is UTF-16 text; save it as UTF-8 (iconv -f UTF-16 -t UTF-8 FILE > NEW)"),
    ("a.csv", "prompt,response\na,b\n".encode("utf-16-le"),
     "looks like UTF-16 text (every other byte is 0); save it as UTF-8"),
    ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
     "is a Git LFS pointer, not the data; run `git lfs pull`"),
    ("a.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
     "is a Git LFS pointer, not the data; run `git lfs pull`"),
    ("a.json", b"<!DOCTYPE html><html>404</html>",
     "is a web page, not the data; download the file itself"),
    ("a.csv", b"PK\x03\x04....",
     "is a zip archive or an Excel workbook; unpack it, or save the sheet as CSV"),
    ("a.jsonl", gzip.compress(b"{}"),
     "is compressed with gzip; give its name the ending .gz"),
    ("a.jsonl.gz", jsonl(GOOD),
     "the file is damaged or not compressed as its name says: *; fetch or write the file again"),
    ("a.jsonl.gz", gzip.compress(jsonl(GOOD).encode())[:5],
     "the compressed file ends early; fetch or write the file again"),
    ("a.parquet", b"PAR1 no",
     "not Parquet data as it should be: *; write the file again"),
    ("a.arrow", b"no arrow at all",
     "not Arrow data as it should be: *; write the file again"),
    ("a.txt", b"caf\xe9",
     "not UTF-8 (unexpected end of data at byte 3); save the file as UTF-8"),
]
JSON: list[Case] = [
    ("a.jsonl", jsonl(GOOD) + '{"prompt": "p" "response"}\n',
     "row 2: bad JSON at column 16: Expecting ',' delimiter; mend it there"),
    ("a.jsonl", jsonl(GOOD) + '{"prompt": "p", "response": "r"',
     "row 2: bad JSON at column 32: Expecting ',' delimiter; the value does not end in its line: write each object in one line"),
    ("a.jsonl", jsonl(GOOD) + '{"prompt": "p", "response": "unfinished\n',
     "row 2: bad JSON at column 40: Invalid control character; the value does not end in its line: write each object in one line"),
    ("a.jsonl", jsonl(GOOD) + '{"prompt": "p", "response": "r"}{"prompt": 1}\n',
     "row 2: bad JSON at column 33: Extra data; a line holds one object and nothing else"),
    ("a.jsonl", jsonl(GOOD) + '{"prompt": "p", "response": "r"}\r{"prompt": "q", "response": "r"}\r',
     "row 2: bad JSON at column 34: Extra data; a line ends with CR alone: save the file with LF line ends"),
    ("a.jsonl", jsonl(GOOD) + '{"prompt": "p", "prompt": "q", "response": "r"}\n',
     "row 2: bad JSON: key 'prompt' stands twice; keep one of them"),
    ("a.jsonl", jsonl(GOOD) + '{"prompt": "p", "response": "r", "score": NaN}\n',
     "row 2: bad JSON: NaN is not JSON; write null or a number"),
    ("a.jsonl", jsonl(GOOD) + '{"prompt": "p", "response": "r", "score": -Infinity}\n',
     "row 2: bad JSON: -Infinity is not JSON; write null or a number"),
    ("a.jsonl", jsonl(GOOD) + '{"prompt": "p", "response": "r", "n": '+'9'*5000+'}\n',
     "row 2: bad JSON: a number has over 4,300 digits; write it as text"),
    ("a.jsonl", jsonl(GOOD) + '{"prompt": "p", "response": '+'['*200000+'\n',
     "row 2: bad JSON: nested too deeply; take the value out"),
    ("a.jsonl", jsonl(GOOD).encode() + b'{"prompt": "p", "response": "\xe9"}\n',
     "row 2: not UTF-8 (invalid continuation byte at byte 29 of the line); save the file as UTF-8"),
    ("a.jsonl", jsonl(GOOD).encode() + b'\0\0\0\0\n',
     "row 2: bad JSON: the row holds NUL bytes, so the file is damaged; take the row out"),
    ("a.jsonl", jsonl(GOOD, "text"),
     "row 2: holds text, not an object; write {column: value, ...}"),
    ("a.jsonl", jsonl(GOOD,7),
     "row 2: holds a number (7), not an object; write {column: value, ...}"),
    ("a.jsonl", jsonl([GOOD, GOOD]),
     "row 1: holds a list of 2, not an object; if these are rows, write each in a line, or give the file's name the ending .json"),
    ("a.jsonl", jsonl(["p", "r"]),
     "row 1: no prompt column among '0', '1'; name it by its place, as data.columns.prompt=0"),
    ("a.jsonl", jsonl(["p", "r"], ["p"]),
     "row 2: has no column '1', and the file's rows are prompt/response: prompt = '0', response = '1'; one file holds one shape: mend the row or take it out", Reading({"prompt":"0","response":"1"})),
    ("a.jsonl", b'{\n "prompt": "p",\n "response": "r"\n}\n',
     "its first line is { alone, and a row is one line here; write each object in one line"),
    ("a.jsonl", b'[\n{"prompt": "p", "response": "r"},\n{"prompt": "q", "response": "s"}\n]\n',
     "its first line is [ alone: this is a list, not JSON lines; give its name the ending .json"),
    ("a.json", json.dumps(GOOD),
     "holds an object, not a list of rows; write [{...}, ...]"),
    ("a.json", json.dumps({"version": 1, "data": [GOOD]},indent=1),
     "holds an object, not a list of rows; save its list 'data' alone"),
    ("a.json", b'[{"prompt": "p", "response": "r"},\n{"prompt": "q" "response": "s"}]',
     "row 2: bad JSON at line 2, column 16: Expecting ',' delimiter; nothing from row 2 on could be read; mend it there"),
    ("a.json", b'[{"prompt": "p", "response": "r"},\n{"prompt": "q", "response": "s"}',
     "row 3: bad JSON at line 2, column 33: the list does not end; nothing from row 3 on could be read; mend it there"),
    ("a.json", b'[{"prompt": "p", "response": "r"}\n{"prompt": "q", "response": "s"}]',
     "row 2: bad JSON at line 2, column 1: a comma or ] is missing; nothing from row 2 on could be read; mend it there"),
    ("a.json", b'[{"prompt": "p", "response": "r"},]',
     "row 2: bad JSON at line 1, column 35: a comma stands before ]; nothing from row 2 on could be read; mend it there"),
    ("a.json", b'[{"prompt": "p", "response": "r"}]\n[]',
     "row 2: text follows the list at line 2, column 1; nothing from row 2 on could be read; write one list and nothing after it"),
    ("a.json", b'[{"prompt": "p", "response": "r"}, {"prompt": "p", "prompt": "q", "response": "r"}]',
     "row 2: bad JSON: key 'prompt' stands twice; keep one of them"),
    ("a.json", b'"text"',
     "holds text, not a list of rows; write [{...}, ...]"),
    ("a.json", b'[{"prompt": "p", "response": "r"}, {"prompt": "\xff", "response": "r"}]',
     "row 2: not UTF-8 at line 1, column 48; save the file as UTF-8"),
]
TABLES: list[Case] = [
    ("a.csv", b'prompt,response\n"a\nb",c\nd,e,f\n',
     "row 2: has 3 fields, the header has 2 (line 4); quote a field that holds a comma or a line end"),
    ("a.csv", b'prompt,response\na,b\n"c,d\ne,f\n',
     'row 2: bad quoting in the row that begins in line 3: unexpected end of data; nothing from row 2 on could be read; write a quote inside a quoted field as ""'),
    ("a.csv", b'prompt,response\na,b\n"c" d,e\nf,g\n',
     'row 2: bad quoting in the row that begins in line 3: \',\' expected after \'"\'; nothing from row 2 on could be read; write a quote inside a quoted field as ""'),
    ("a.csv", b'prompt,prompt\na,b\n',
     "column 'prompt' stands twice in the header; rename one"),
    ("a.csv", b'prompt;response\na;b\n',
     "the first line is one column that holds ';'; save it with commas between the columns"),
    ("a.csv", b'prompt\tresponse\na\tb\n',
     "the first line has tabs and no comma; give the file's name the ending .tsv"),
    ("a.csv", b'prompt,response\na,b\ncaf\xe9,d\n',
     "row 2: not UTF-8 (byte 0xe9); save the file as UTF-8"),
    ("a.csv", b'prompt,r\xe9ponse\na,b\n',
     "the header is not UTF-8 (byte 0xe9); save the file as UTF-8"),
    ("a.csv", b'prompt,response\na,b\na\0,d\n',
     "row 2: the prompt (column 'prompt') holds a NUL character at 1; take it out"),
    ("a.csv", b'prompt,response\na,b\n,\n',
     "row 2: the prompt (column 'prompt') is empty; fill it or take the row out"),
    ("a.csv", b'a,b\nc\n',
     "row 2: has 1 field, the first row has 2 (line 2); quote a field that holds a comma or a line end", Reading({"prompt":"0","response":"1"}, header=False)),
    ("a.csv", b'a,b\nc,d\n',
     "row 1: no prompt column among '0', '1'; name it by its place, as data.columns.prompt=0", Reading(header=False)),
    ("a.csv", b'question,category\na,b\n',
     "row 1: no response column among 'question', 'category'; name it with data.columns.response=NAME"),
    ("a.csv", b'text,category\na,b\n',
     "row 1: 'text' stands beside 'category'; set data.columns.text=text for plain text, or data.columns.prompt=text with data.columns.response=category"),
    ("a.tsv", b'prompt\tresponse\na\tb\nc\n',
     "row 2: has 1 field, the header has 2 (line 3); a field can't hold a tab or a line end"),
    ("a.tsv", b'prompt\tresponse\na\tb\n"say ""x"""\td\n',
     "row 2: column 'prompt' is quoted as in CSV, and a TSV has no quoting (line 3); save it as CSV"),
    ("a.tsv", b'prompt,response\na,b\n',
     "the first line is one column that holds ','; save it with tabs between the columns"),
    ("a.parquet", parquet(prompt=["p", "q"],response=[datetime.date(2024,1,2),datetime.date(2024,1,2)]),
     "row 1: the response (column 'response') is a date or time (date32[day]), not text; write it as text"),
    ("a.parquet", parquet(prompt=["p"],response=[decimal.Decimal("1.10")]),
     "row 1: the response (column 'response') is a decimal number (decimal128(3, 2)), not text; write it as text"),
    ("a.parquet", parquet(prompt=["p", "q"],response=["r", None]),
     "row 2: the response (column 'response') is null; fill it or take the row out"),
    ("a.parquet", parquet(prompt=["p", "q"],response=["r", None])[:-9],
     "not Parquet data as it should be: *; write the file again"),
]
COLUMNS: list[Case] = [
    ("a.jsonl", jsonl({"prompt": "p"}),
     "row 1: no response column among 'prompt'; name it with data.columns.response=NAME"),
    ("a.jsonl", jsonl({"question": "q", "response": "r", "answer": "a"}),
     "row 1: 'response', 'answer' could each be the response; set data.columns.response=response or data.columns.response=answer"),
    ("a.jsonl", jsonl({"prompt": "p", "question": "q", "response": "r"}),
     "row 1: 'prompt', 'question' could each be the prompt; set data.columns.prompt=prompt or data.columns.prompt=question"),
    ("a.jsonl", jsonl({"messages": [USER, BOT], "prompt": "p", "response": "r"}),
     "row 1: both 'messages' and 'prompt', 'response' could be meant; set data.columns.messages=messages or data.columns.prompt=prompt"),
    ("a.jsonl", jsonl({"question": "q", "context": "c", "answer": "r"}),
     "row 1: 'context' could belong to the prompt 'question'; data.columns.prompt=question leaves it out, and named 'instruction' 'question' is followed by it"),
    ("a.jsonl", jsonl({"text": "t", "title": "x"}),
     "row 1: 'text' stands beside 'title'; set data.columns.text=text for plain text, or data.columns.prompt=text with data.columns.response=title"),
    ("a.jsonl", jsonl({"prompt": "p", "response": "r", "chosen": "c", "rejected": "d"}),
     "row 1: both 'chosen', 'rejected' and 'response' could be meant; set data.columns.chosen=chosen or data.columns.response=response"),
    ("a.jsonl", jsonl({"prompt": "p", "messages": [USER], "chosen": [BOT], "rejected": [OTHER]}),
     "row 1: 'prompt' and 'messages' could each be the prompt; set data.columns.prompt=prompt, or data.columns.messages=messages and data.columns.chosen=chosen"),
    ("a.jsonl", jsonl({"chosen": "c", "rejected": "d"}),
     "row 1: no prompt column among 'chosen', 'rejected'; name it with data.columns.prompt=NAME"),
    ("a.jsonl", jsonl(GOOD),
     "row 1: data.columns.response=respnse is no column; did you mean response?", Reading({"response":"respnse"})),
    ("a.jsonl", jsonl(GOOD),
     "data.columns.promt: unknown key; did you mean prompt?", Reading({"promt":"prompt"})),
    ("a.jsonl", jsonl(GOOD),
     "data.columns: messages and prompt are both set; a row is one or the other: leave data.columns.prompt empty", Reading({"prompt":"prompt","messages":"m"})),
    ("a.jsonl", jsonl(GOOD),
     "row 1: prompt and response are both column 'prompt'; set data.columns.response to another", Reading({"prompt":"prompt","response":"prompt"})),
    ("a.jsonl", jsonl(GOOD, {"prompt": "p"}),
     "row 2: has no column 'response', and the file's rows are prompt/response: prompt = 'prompt', response = 'response'; one file holds one shape: mend the row or take it out"),
    ("a.jsonl", jsonl(GOOD, {"messages": [USER, BOT]}),
     "row 2: has no column 'prompt', and the file's rows are prompt/response: prompt = 'prompt', response = 'response'; one file holds one shape: mend the row or take it out"),
    ("a.jsonl", jsonl(GOOD, {**GOOD, "answer": "a"}),
     "row 2: 'response', 'answer' could each be the response; set data.columns.response=response or data.columns.response=answer"),
    ("a.jsonl", jsonl({"text": "Q: a\nA: b"}, {"text": "no"}),
     "row 2: the text (column 'text') does not hold data.separator='\\nA: '; mend the separator or the row", Reading(separator="\nA: ")),
    ("a.jsonl", jsonl({"text": "Q: a\nA: b"}, {"text": "Q: a\nA: "}),
     "row 2: the response is empty; fill it or take the row out", Reading(separator="\nA: ")),
]
VALUES: list[Case] = [
    ("a.jsonl", jsonl(GOOD, {"prompt": "p", "response": " \n"}),
     "row 2: the response (column 'response') is empty; fill it or take the row out"),
    ("a.jsonl", jsonl(GOOD, {"prompt": "", "response": "r"}),
     "row 2: the prompt (column 'prompt') is empty; fill it or take the row out"),
    ("a.jsonl", jsonl(GOOD, {"prompt": "p", "response": 5}),
     "row 2: the response (column 'response') is a number (5), not text; write it as text"),
    ("a.jsonl", jsonl(GOOD, {"prompt": "p", "response": None}),
     "row 2: the response (column 'response') is null; fill it or take the row out"),
    ("a.jsonl", jsonl(GOOD, {"prompt": True, "response": "r"}),
     "row 2: the prompt (column 'prompt') is true or false, not text; write it as text"),
    ("a.jsonl", jsonl(GOOD) + '{"prompt": "\\ud800", "response": "r"}\n',
     "row 2: the prompt (column 'prompt') holds half of a surrogate pair at character 0; take it out"),
    ("a.jsonl", jsonl(GOOD) + '{"prompt": "p\\u0000", "response": "r"}\n',
     "row 2: the prompt (column 'prompt') holds a NUL character at 1; take it out"),
    ("a.jsonl", jsonl({**GOOD, "label": True}, {**GOOD, "label": None}),
     "row 2: the label (column 'label') is null; write true or false, or set data.columns.label=label for 0 and 1"),
    ("a.jsonl", jsonl({**GOOD, "label": None}, {**GOOD, "label": True}),
     "row 2: column 'label' is true or false, and it was not in the first row; set data.columns.label=label, or leave the column out"),
    ("a.jsonl", jsonl({**GOOD, "label": 1}, {**GOOD, "label": 2}),
     "row 2: the label (column 'label') is a number (2); write true or false", Reading({"label":"label"})),
    ("a.jsonl", jsonl({"query": "q", "choices": ["a"], "gold": 0}, {"query": "q", "choices": ["a"], "gold": 1}),
     "row 2: column 'gold' is a number (1); write the right one's index, 0 to 0"),
]
MESSAGES: list[Case] = [
    ("a.jsonl", chat(),
     "row 2: the messages (column 'messages') is an empty list; fill it or take the row out"),
    ("a.jsonl", chat(USER),
     "row 2: has no assistant turn, so nothing to train; take the row out"),
    ("a.jsonl", chat(USER, BOT, USER),
     "row 2: the last turn is the user's, not the assistant's; take out the turns after the last answer"),
    ("a.jsonl", chat(BOT),
     "row 2: has no user turn; write what is answered, or take the row out"),
    ("a.jsonl", chat(USER, BOT, {"role": "system", "content": "s"}, USER, BOT),
     "row 2: message 3 is a system turn after the first message; put it first"),
    ("a.jsonl", chat(USER, {"role": "tool", "content": "x"}, BOT),
     "row 2: message 2 is a tool's result and follows the user's turn, with no call before it; put it after the call"),
    ("a.jsonl", chat(USER, {"role": "narrator", "content": "x"}, BOT),
     "row 2: message 2 has role 'narrator'; it is system, user, assistant or tool (ShareGPT: human, gpt, function_call, observation): mend it"),
    ("a.jsonl", chat(USER, {"content": "x"}),
     "row 2: message 2 has no 'role'; it is system, user, assistant or tool (ShareGPT: human, gpt, function_call, observation): mend it"),
    ("a.jsonl", chat(USER, "hello"),
     "row 2: message 2 is text; write {'role': ..., 'content': ...}"),
    ("a.jsonl", chat({"role": "user", "content": " "}, BOT),
     "row 2: message 1 (the user's) is empty; fill it or take the row out"),
    ("a.jsonl", chat(USER, {"role": "assistant", "content": None}),
     "row 2: message 2's content is null; fill it or take the row out"),
    ("a.jsonl", chat({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": "x"}]}, BOT),
     "row 2: message 1's content has a part that is of type 'image_url'; only text is read: take the row out"),
    ("a.jsonl", chat({**USER, "tool_calls": [{"name": "f"}]}, BOT),
     "row 2: message 1 is the user's and has tool calls; they are the assistant's: take them out"),
    ("a.jsonl", chat(USER, {**BOT, "tool_calls": [{"arguments": {}}]}),
     "row 2: tool call 1 of message 2 has no name; write {'name': ..., 'arguments': ...}"),
    ("a.jsonl", chat(USER, {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}, {"role": "tool", "tool_call_id": "2", "content": "x"}, BOT),
     "row 2: message 3 answers the tool call '2', which no turn made; mend tool_call_id"),
    ("a.jsonl", chat(USER, {**BOT, "weight": 0.5}),
     "row 2: message 2's weight is a number (0.5); write 0 or 1"),
    ("a.jsonl", chat(USER, {**BOT, "thinking": "hm"}),
     "row 2: message 2 has 'thinking', which nothing reads; take it out or name it 'reasoning_content'"),
    ("a.jsonl", jsonl({"messages": [USER, BOT]}, {"messages": "[...]"}),
     "row 2: the messages (column 'messages') is text, not a list of messages; write [{'role': ..., 'content': ...}, ...], as JSON lines can"),
    ("a.jsonl", jsonl({"messages": [USER, BOT], "system": "s"}, {"messages": [{"role": "system", "content": "s"}, USER, BOT], "system": "s"}),
     "row 2: has a system turn and a column 'system' too; empty one of them"),
    ("a.jsonl", jsonl({"messages": [USER, BOT], "tools": "[]"}, {"messages": [USER, BOT], "tools": "none"}),
     "row 2: column 'tools' holds bad JSON at column 1: Expecting value; mend it there"),
    ("a.jsonl", jsonl({"messages": [USER, BOT], "tools": "[]"}, {"messages": [USER, BOT], "tools": [{"x": 1}]}),
     "row 2: function 1 of column 'tools' has no name; write {'name': ..., 'description': ..., 'parameters': ...}"),
    ("a.jsonl", jsonl({"conversations": [HUMAN, GPT]}, {"conversations": [HUMAN, {"from": "function_call", "value": "f()"}, GPT]}),
     "row 2: message 2 (a function_call) holds bad JSON at column 1: Expecting value; mend it there"),
    ("a.jsonl", jsonl({"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a", "rejected": "a"}),
     "row 2: the chosen and the rejected answer are the same; take the row out"),
    ("a.jsonl", jsonl({"chosen": [USER, BOT], "rejected": [USER, OTHER]}, {"chosen": [USER, BOT], "rejected": [{"role": "user", "content": "other"}, BOT]}),
     "row 2: the chosen and the rejected conversation part after 0 equal messages, and not at an answer of the assistant; they need one prompt: mend the row"),
    ("a.jsonl", jsonl({"prompt": "p", "chosen": [BOT], "rejected": [OTHER]}, {"prompt": "p", "chosen": [USER, BOT], "rejected": [USER, OTHER]}),
     "row 2: column 'prompt' is not how the chosen answer's conversation begins; mend the row"),
    ("a.jsonl", jsonl({"messages": [USER], "chosen": "a", "rejected": "b"}, {"messages": [USER, BOT], "chosen": "a", "rejected": "b"}),
     "row 2: the prompt ends with the assistant's turn; take that turn out"),
]
# fmt: on
CASES = FILES + JSON + TABLES + COLUMNS + VALUES + MESSAGES


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}: {case[2][:60]}")
def test_each_gets_its_line(tmp_path: pathlib.Path, case: Case) -> None:
    name, content, expected, *reading = case
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        rows = list(formats.Table(str(path), *reading))
        faults = [row for row in rows if isinstance(row, examples.Fault)]
        told = [row.message for row in faults]
        empty = re.search(r"is (empty|null; fill|an empty list)", told[0])
        assert faults[0].kind == ("empty" if empty else "malformed")
    except errors.UserError as error:
        told = [str(error)]
    expected = re.escape(expected).replace(r"\*", ".+")
    place = "" if expected.startswith("data") else f"{re.escape(str(path))}: ?"
    assert re.fullmatch(place + expected, told[0]), told[0]
    assert len({message.split(": ", 1)[1] for message in told}) == 1  # and nothing else is said
    with pytest.raises(errors.UserError) as caught:  # `read` stops at it
        formats.read(str(path), *reading)
    assert str(caught.value) == told[0]
