"""The page to draw or upload a digit on, or to upload another picture, and its endpoint
``predict``, by Gradio.
"""

import base64
import contextlib
import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import DataError, TrainerError

if TYPE_CHECKING:  # Loading it takes seconds.
    import gradio as gr

    from trainer.inference.classifier import Answer, Picture, Prediction

Classify = Callable[["Picture"], "Answer"]


def build(classify: Classify, name: str, classes: Sequence[str] | None = None) -> "gr.Blocks":
    """Builds the page.

    Args:
        classify: Answers a picture of one digit; requests come from several threads at once.
        name: What the page calls the model.
        classes: Names of the classes of whole pictures; None: digits, which can be drawn.
    """
    import gradio as gr

    def answer(picture: object) -> "Prediction":
        answer = classify(_picture(picture))
        if answer.error:
            raise answer.error
        [prediction] = answer.predictions
        return prediction

    def named(prediction: "Prediction") -> dict[str, float]:
        names = classes or [str(digit) for digit in range(10)]
        return dict(zip(names, prediction.probabilities.tolist(), strict=True))

    def show(picture: object) -> tuple:
        if not picture:  # Cleared.
            return None, None
        try:
            prediction = answer(picture)
        except TrainerError as error:
            # gr.Error would leave the previous picture's answer on the page.
            gr.Warning(html.escape(str(error), quote=False))
            return None, None
        pixels = prediction.digit.pixels
        return named(prediction), pixels[..., 0] if pixels.shape[2:] == (1,) else pixels

    def predict(image: gr.FileData) -> dict:
        """Returns the digit in a picture, and the probabilities of 0 to 9, in this order; or the
        class of a picture, and the probabilities by the names of the classes.
        """
        try:
            prediction = answer(image)
        except TrainerError as error:
            raise gr.Error(str(error), print_exception=False) from error
        if classes:
            return {"class": classes[prediction.label], "probabilities": named(prediction)}
        return {
            "digit": prediction.label,
            "probabilities": prediction.probabilities.tolist(),
        }

    # Every minute, uploaded files older than ten minutes are deleted.
    title = "What is it?" if classes else "Which digit is it?"
    how = "Upload a picture" if classes else "Draw one or upload a picture"
    canvas = None
    with gr.Blocks(title=title, delete_cache=(60, 600)) as page:
        gr.Markdown(f"# {title}\n{how}, and `{name}` answers.")
        with gr.Row():
            with gr.Column(min_width=400):
                if not classes:
                    with gr.Tab("Draw"):
                        canvas = gr.HTML(
                            html_template=_CANVAS, css_template=_CANVAS_CSS, js_on_load=_CANVAS_JS
                        )
                with gr.Tab("Upload"):
                    upload = gr.Image(
                        sources=["upload", "clipboard"], buttons=[], show_label=False, height=400
                    )
            with gr.Column(min_width=240):
                pixels = gr.Image(
                    label="What the network sees",
                    format="png",
                    buttons=[],
                    elem_id="pixels",
                    height=300,
                )
            with gr.Column(min_width=240):
                label = gr.Label(label="What it says", num_top_classes=10)
        # Gradio's preprocessing would decode the picture, with limits and errors of its own.
        options = {"preprocess": False, "api_visibility": "private", "show_progress": "hidden"}
        if canvas:
            canvas.input(show, canvas, [label, pixels], **options)
        upload.change(show, upload, [label, pixels], **options)
        gr.api(predict, api_name="predict")
    return page.queue(max_size=32)


def _picture(picture: object) -> "Picture":
    """Returns what to call a picture of a request, and its file or content.

    Args:
        picture: ``{"path": ...}``, an uploaded file, or a text ``data:...;base64,...``.

    >>> _picture("data:text/plain;base64,c2V2ZW4=")
    ('data:text/plain;base64', b'seven')
    """
    if isinstance(picture, dict) and isinstance(path := picture.get("path"), str):
        return Path(path).name, Path(path)
    if isinstance(picture, str) and ";base64," in picture:
        kind, _, content = picture.partition(",")
        with contextlib.suppress(ValueError):
            return kind[:40], base64.b64decode(content)
    raise DataError(
        'Expected a picture as {"path": ...}, once it is uploaded, or as "data:image/png;base64,'
        f'...". Received: {str(picture)[:100]!r}.'
    )


# Not Gradio's Sketchpad, which needs WebGL, and a click on its brush before the first stroke.
_CANVAS = """
<canvas width="400" height="400" aria-label="Canvas to draw a digit on"></canvas>
<button type="button">Clear</button>
"""

_CANVAS_CSS = """
canvas {
    display: block; width: 100%; max-width: 400px; aspect-ratio: 1; cursor: crosshair;
    touch-action: none; border: 1px solid var(--border-color-primary);
    border-radius: var(--block-radius);
}
button {
    margin-top: 8px; padding: 4px 12px; cursor: pointer; font-size: var(--button-small-text-size);
    font-weight: normal; border-radius: var(--button-small-radius);
    background: var(--button-secondary-background-fill); color: var(--button-secondary-text-color);
}
"""

_CANVAS_JS = """
const paper = element.querySelector("canvas"), pen = paper.getContext("2d");
const blank = () => { pen.fillStyle = "white"; pen.fillRect(0, 0, paper.width, paper.height); };
const handIn = picture => { props.value = picture; trigger("input"); };
const draw = event => {
    const edge = paper.getBoundingClientRect(), scale = paper.width / edge.width;
    pen.lineTo((event.clientX - edge.left) * scale, (event.clientY - edge.top) * scale);
    pen.stroke();
};
blank();
Object.assign(pen, { lineWidth: 28, lineCap: "round", lineJoin: "round", strokeStyle: "black" });
paper.onpointerdown = event => {
    paper.setPointerCapture(event.pointerId);
    pen.beginPath();
    draw(event);
    draw(event);  // A dot is a line to where it began.
};
paper.onpointermove = event => { if (paper.hasPointerCapture(event.pointerId)) draw(event); };
paper.onlostpointercapture = () => handIn(paper.toDataURL());
element.querySelector("button").onclick = () => { blank(); handIn(null); };
"""

# Eight pixels of the screen for one of the 28×28; important, because Gradio has rules for it too.
PAGE_CSS = """
#pixels img {
    width: 224px !important; height: 224px !important; object-fit: fill !important;
    image-rendering: pixelated;
}
"""
