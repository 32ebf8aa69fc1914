"""Captions as files hold them: with any white space, or several in one field, as a list that may be spelled out."""

import ast
import contextlib
import io
import json
import tokenize


def folded(value):
    """Fold the white space of a caption; what is no string is returned as it is."""
    return " ".join(value.split()) if isinstance(value, str) else value


def spelled_list(text):
    """Read a list of strings that is spelled out as JSON, Python or NumPy do, ['a' 'b']; None if a text is not one."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    listed = None
    with contextlib.suppress(ValueError, RecursionError):
        listed = json.loads(text)
    if listed is None:
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, tokenize.TokenError):
            tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.string.strip()]
            if all(token.type == tokenize.STRING or token.string == "," for token in tokens[1:-1]):
                listed = [ast.literal_eval(token.string) for token in tokens if token.type == tokenize.STRING]
    return listed if listed and all(isinstance(value, str) for value in listed) else None


def captions_in(value):
    """List the captions of a field, which may hold a list of them, also one spelled out; [None] if that is empty."""
    listed = spelled_list(value) if isinstance(value, str) else value
    return (listed if isinstance(listed, list) else [value]) or [None]
