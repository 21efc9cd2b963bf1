"""The directive `quiz`: questions with choices, each of which explains itself once it is chosen.

On the site: radio buttons that need no script, and when printed empty boxes and a key. In other
formats: lists, then the answers. The format is described in CONTRIBUTING.md.
"""

from __future__ import annotations

from collections.abc import Iterator

from book_forms import MARK, Malformed, questions_of
from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective
from sphinx.util.logging import getLogger

logger = getLogger(__name__)


class Quiz(nodes.General, nodes.Element):
    """Holds a list of questions, each a list item of blocks and then the list of its choices."""


class Tag(nodes.General, nodes.Inline, nodes.TextElement):
    """An HTML element with a name and attributes of its own."""


class QuizDirective(SphinxDirective):
    """Parse the questions as Markdown and check their form."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        try:
            questions = questions_of("\n".join(self.content))
        except Malformed as error:
            line = self.lineno + (0 if error.line is None else self.content_offset + error.line + 1)
            logger.warning("%s", error, location=(self.env.docname, line), type="quiz")
            return []
        quiz = Quiz()
        self.state.nested_parse(self.content, self.content_offset, quiz)
        for node, (_, choices) in zip(quiz.children[0].children, questions, strict=True):
            for choice, (right, _, _) in zip(node.children[-1].children, choices, strict=True):
                choice["right"] = right
                first = choice.children[0].children[0]
                first.parent.replace(first, nodes.Text(MARK.sub("", first, count=1)))
        return [quiz]


# ---- what is written ---------------------------------------------------------------------------


class WriteQuizzes(SphinxPostTransform):
    """Replace each quiz by what the builder can show."""

    default_priority = 950  # references and numbers have been put in

    def run(self, **kwargs) -> None:
        html = self.app.builder.format == "html"
        for number, quiz in enumerate(list(self.document.findall(Quiz)), start=1):
            questions = quiz.children[0].children
            key = _key(questions)
            if html:
                fields = [_fieldset(question, f"quiz-{number}-{i}", i)
                          for i, question in enumerate(questions, start=1)]
                parts = [*fields, _tag("div", "quiz-key", *key)]
                quiz.replace_self(_tag("div", "quiz", *parts))
            else:
                quiz.replace_self([_plain(questions), *key])


def _tag(name: str, classes: str, /, *children: nodes.Node, **attributes: str) -> Tag:
    ids = [attributes.pop("id")] if "id" in attributes else []
    return Tag("", "", *children, tag=name, ids=ids, classes=classes.split(),
               attributes=attributes)


def _fieldset(question: nodes.list_item, name: str, number: int) -> Tag:
    """Return the question as a group of radio buttons."""
    lettered = list(_lettered(question))
    text, *more, _ = question.children
    legend = _tag("legend", "", _tag("span", "quiz-mark", nodes.Text(f"{number}.")),
                  nodes.Text(" "), *text.children)
    return _tag("fieldset", "quiz-question", legend, *more,
                *(_radio(choice, name, letter) for letter, choice in lettered))


def _radio(choice: nodes.list_item, name: str, letter: str) -> Tag:
    here, verdict = f"{name}-{letter.lower()}", "right" if choice["right"] else "wrong"
    button = _tag("input", "", type="radio", name=name, id=here, value=verdict,
                  autocomplete="off")
    label = _tag("label", "", _tag("span", "quiz-mark", nodes.Text(f"{letter}.")),
                 _tag("span", "", *choice.children[0].children), **{"for": here})
    explained = _tag("div", f"quiz-why quiz-{verdict}", *_judged(choice),
                     id=f"{here}-why")
    return _tag("div", "quiz-choice", button, label,
                _tag("div", "quiz-live", explained, **{"aria-live": "polite"}))


def _judged(choice: nodes.list_item, letter: str = "") -> list[nodes.Node]:
    """Return the explanation with its verdict in front."""
    first, *more = choice.children[1:]
    verdict = nodes.strong("", letter + ("Right." if choice["right"] else "Wrong."))
    return [nodes.paragraph("", "", verdict, nodes.Text(" "), *first.children), *more]


def _plain(questions: list[nodes.list_item]) -> nodes.enumerated_list:
    """Return the questions and their choices as lists, without the explanations."""
    return _numbered([[*question.children[:-1], nodes.bullet_list("", *(
        nodes.list_item("", nodes.paragraph("", f"{letter}. ", *choice.children[0].children))
        for letter, choice in _lettered(question)))] for question in questions])


def _key(questions: list[nodes.list_item]) -> list[nodes.Node]:
    """Return the answers to all questions, as copies that no link leads to."""
    copies = [question.deepcopy() for question in questions]
    for node in (node for copy in copies for node in copy.findall(nodes.Element)):
        node["ids"] = []
    return [nodes.rubric("", "Answers to the quiz"), _numbered([[nodes.bullet_list("", *(
        nodes.list_item("", *_judged(choice, f"{letter}. "))
        for letter, choice in _lettered(copy)))] for copy in copies])]


def _lettered(question: nodes.list_item) -> Iterator[tuple[str, nodes.list_item]]:
    return zip("ABCD", question.children[-1].children, strict=False)


def _numbered(items: list[list[nodes.Node]]) -> nodes.enumerated_list:
    return nodes.enumerated_list("", *(nodes.list_item("", *item) for item in items),
                                 enumtype="arabic", prefix="", suffix=".")


def visit_tag(writer, node: Tag) -> None:
    """Write the start of an HTML element."""
    start = writer.emptytag if node["tag"] == "input" else writer.starttag
    writer.body.append(start(node, node["tag"], "", **node["attributes"]))


def depart_tag(writer, node: Tag) -> None:
    """Write its end."""
    if node["tag"] != "input":
        writer.body.append(f"</{node['tag']}>")


def setup(app) -> dict[str, bool]:
    """Register with Sphinx."""
    app.add_node(Quiz)
    app.add_node(Tag, html=(visit_tag, depart_tag))
    app.add_directive("quiz", QuizDirective)
    app.add_post_transform(WriteQuizzes)
    app.add_css_file("quiz.css")
    app.add_js_file("quiz.js", loading_method="defer")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
