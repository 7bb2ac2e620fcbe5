"""generate.py without prompts: a conversation at the terminal, with commands that begin with a slash."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from data.answers import make_printable
from data.formats import FORMATS, continue_dialogue
from data.images import ImageRef
from finished.prompt_template import Answer, AnswerStreamer, EncodedPrompt, PromptTemplate, RenderedPrompt
from options.errors import UserError

# reply(name of a model, its template, a prompt, what receives the answer's tokens)
Reply = Callable[[str, PromptTemplate, EncodedPrompt, AnswerStreamer], Answer]

COMMANDS = "/system TEXT, /undo, /reset, /use N or /quit"


@dataclass
class Conversation:
    """The turns so far. Formats without turns start anew with each question.

    Attributes:
        template: renders the prompts.
        system: the system prompt of every question, or None.
        rows: the row after each answer, with all turns up to it.
        images: those of each of these rows, in the order in which it shows them.
    """

    template: PromptTemplate
    system: str | None = None
    rows: list[dict] = field(default_factory=list)
    images: list[tuple[ImageRef, ...]] = field(default_factory=list)

    def make_prompt(self, question: str, images: Sequence[ImageRef] = ()) -> tuple[dict, RenderedPrompt]:
        """Return (row with the turns so far and the question, which shows the images; its prompt).

        Does not change the conversation: `record_answer` does. Raises UserError.
        """
        row_format, last = self.template.format, self.rows[-1] if self.rows else None
        row = self.template.show_question(question, images, "the question")
        if row_format is FORMATS["chat"] and last:
            row = {"messages": [*last["messages"], *row["messages"]]}
        elif row_format is FORMATS["guanaco"] and last:
            markers = self.template.context.markers
            row = {"text": continue_dialogue(question, last["text"], last["answer"], markers)}
        shown = (*(self.images[-1] if self.images else ()), *images)
        return row, self.template.render_shown(row, shown, "the question", self.system)

    def record_answer(self, row: dict, images: tuple[ImageRef, ...], answer: str) -> None:
        """Make the row with its images and its answer the turns so far; formats without turns keep none."""
        if self.template.format is FORMATS["chat"]:
            answered = {"role": "assistant", "content": answer.strip()}
            self.rows.append({"messages": [*row["messages"], answered]})
        elif self.template.format is FORMATS["guanaco"]:
            self.rows.append(row | {"answer": answer})
        if self.template.format.is_conversation:
            self.images.append(images)

    def undo(self) -> bool:
        """Remove the last question and its answer. Return whether there was one."""
        had_turns = bool(self.rows)
        del self.rows[-1:], self.images[-1:]
        return had_turns

    def clear(self) -> None:
        """Remove all turns."""
        self.rows.clear()
        self.images.clear()


class Chat:
    """Holds a conversation with streamed answers.

    Attributes:
        reply: generates a streamed answer.
        names: the models that can answer: BASE and the runs.
        templates: {name of a run: its template}.
        model_name: the model that answers; at first the first run.
        conversation: the turns so far.
        images: those that the next question shows.
    """

    def __init__(
        self,
        reply: Reply,
        names: list[str],
        templates: dict[str, PromptTemplate],
        system: str | None,
        image_paths: Sequence[str] = (),
    ):
        """Begin a conversation.

        Args:
            reply: generates a streamed answer.
            names: the models that can answer.
            templates: {name of a run: its template}.
            system: the system prompt, or None.
            image_paths: images of the first question.

        Raises UserError for an image that cannot be used.
        """
        self.reply, self.names, self.templates = reply, names, templates
        self.model_name = next(iter(templates))
        self.conversation = Conversation(templates[self.model_name], system)
        self.images = self.conversation.template.images.find_named(image_paths, "--image_path")

    def run(self) -> None:
        """Answer the user's questions, and do what the commands say, until /quit or Ctrl-D."""
        has_turns = self.conversation.template.format.is_conversation
        turns = "a conversation" if has_turns else "each question by itself"
        numbered = ", ".join(f"{i} {name}" for i, name in enumerate(self.names))
        print(f"{self.model_name}: {turns}. {self._list_commands()} (or Ctrl-D)")
        print(f"/undo takes the last question back, /reset all of them; /use N: another answers ({numbered})")
        sys.stdout.flush()
        for line in read_lines():
            if line == "/quit":
                return
            if line.startswith("/"):
                print(self._obey(*line.partition(" ")[::2]), flush=True)
            elif line:
                self._print_reply(line)

    def _obey(self, command: str, text: str) -> str:
        """Do what a command says. Return the line to print."""
        text = text.strip()
        if command in ("/reset", "/new") and not text:
            self.conversation.clear()
            self.images = []
            return "a new conversation"
        if command == "/undo" and not text:
            return (
                "the last question is taken back" if self.conversation.undo() else "no question to take back"
            )
        if command == "/image":
            return self._add_image(text)
        if command == "/system":
            return self._set_system(text)
        if command == "/use" and text.isdecimal() and int(text) < len(self.names):
            return self._select_model(self.names[int(text)])
        return self._list_commands()

    def _list_commands(self) -> str:
        """Return the commands that the model takes."""
        return "/image PATH, " * (self.conversation.template.images.format is not None) + COMMANDS

    def _add_image(self, text: str) -> str:
        """Let the next question show an image more; "" = none. Return the line to print."""
        if not text:
            self.images = []
            return "the next question shows no image"
        path = _read_path(text)
        try:
            self.images += self.conversation.template.images.find_named([path], "/image")
        except UserError as e:
            return str(e)
        return f"the next question shows {', '.join(ref.label for ref in self.images)}"

    def _set_system(self, text: str) -> str:
        """Make `text` the system prompt from the next question on; "" = none. Return the line to print."""
        try:
            self.conversation.template.check_system()
        except UserError as e:
            return f"/system: {e}"
        try:
            self.conversation.template.images.check_text(text, "/system")
        except UserError as e:
            return str(e)
        self.conversation.system = text or None
        return "the system prompt is changed" if text else "no system prompt"

    def _select_model(self, name: str) -> str:
        """Let another model answer. The turns so far stay if it has the same template."""
        self.model_name = name
        template, system = choose_template(name, self.templates), self.conversation.system
        if template is self.conversation.template:
            return f"{name} answers"
        self.conversation = Conversation(template)
        if system is not None:
            try:
                template.check_system()
            except UserError as e:
                return f"{name} answers, without the system prompt: {e}"
            self.conversation.system = system
        return f"{name} answers, a new conversation"

    def _print_reply(self, question: str) -> None:
        """Print the streamed reply to a question, and record it; print an error for an unusable question."""
        conversation, template = self.conversation, self.conversation.template
        is_conversation = template.format.is_conversation
        try:
            row, prompt = conversation.make_prompt(question, self.images)
            encoded = template.encode(
                replace(prompt, origin="the conversation") if is_conversation else prompt
            )
            stream = AnswerStreamer(template, lambda piece: print(make_printable(piece), end="", flush=True))
            answer = self.reply(self.model_name, template, encoded, stream)
        except UserError as e:
            print(f"{e}{'; /reset begins another' if is_conversation else ''}", flush=True)
            return
        print("" if answer.ended else " ...", flush=True)
        conversation.record_answer(row, prompt.images, answer.text)
        self.images = []


def _read_path(text: str) -> str:
    """Return the path that a line names: as it stands, or quoted for a shell, as terminals paste a file."""
    if os.path.exists(os.path.expanduser(text)):
        return text
    try:
        words = shlex.split(text)
    except ValueError:  # a quote in a name
        return text
    return words[0] if len(words) == 1 else text


def choose_template(name: str, templates: dict[str, PromptTemplate]) -> PromptTemplate:
    """Return the template of the model `name`; BASE has the first run's."""
    return templates.get(name) or next(iter(templates.values()))


def read_lines() -> Iterator[str]:
    """Yield the lines that the user types, without outer white space, until Ctrl-D."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - arrow keys and a history for input()
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            print()
            return
