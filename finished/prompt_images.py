"""The images of prompts: named by the user or by a row, shown in the prompt's text, and read for a model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from data.formats import Format, Rendered
from data.image_batches import plan_prompt_images
from data.image_files import ImageFiles, find_image
from data.image_format import ImageFormat
from data.image_parts import MARK, has_image_parts
from data.image_store import IMAGE_COLUMNS, ImageStore
from data.image_texts import check_placeholders, expand_images
from data.images import ImageRef
from data.pixels import without_remedies
from data.prefetch import decode_images
from data.row_files import Rows
from data.row_images import MESSAGE_COLUMNS, check_reserved, show_images, take_image_columns
from options.errors import UserError, reword_errors


@dataclass(frozen=True)
class PromptImages:
    """How the prompts of a run show images.

    Attributes:
        format: how the model takes images; None = it takes none.
        refusal: why it takes none.
        files: finds the images that rows name.
    """

    format: ImageFormat | None = None
    refusal: str = "takes texts only"
    files: ImageFiles = field(default_factory=ImageFiles)

    @property
    def placeholder(self) -> str:
        """The text that stands for an image; "" if the model takes none."""
        return self.format.placeholder if self.format else ""

    def find_named(self, paths: Sequence[str], option: str) -> list[ImageRef]:
        """Return the images of paths that the user names. Raises UserError, which names the option."""
        refs = []
        for path in paths:
            if self.format is None:
                raise UserError(f"{option} {path}: {self.refusal}")
            refs.append(find_image(path, option))
            self._check_shape(refs[-1], f"{option} {path}")
        return refs

    def show_named(self, row: dict, refs: Sequence[ImageRef], form: Format, origin: str) -> dict:
        """Return a question's row that shows these images, where MARK stands in it or before it.

        Raises UserError, which begins with `origin`, for a text that means tokens of images, and unless MARK
        stands once for each image or nowhere.
        """
        self._check_texts(row, origin)
        if self.format is None:
            return row
        marks = str(row[form.prompt_column]).count(MARK)
        if marks not in (0, len(refs)):
            raise UserError(f"{origin}: has {marks} places {MARK} for {len(refs)} image(s)")
        return show_images(row, [ref.path for ref in refs], True, form, self.placeholder, origin)[0]

    def take_columns(self, row: dict, folder: str, origin: str) -> tuple[dict, list]:
        """Return (a row without its columns of images, the images of these). Raises UserError for wrong ones.

        folder: that paths are relative to.
        """
        with ImageStore(origin) as store:
            data = Rows([store.take_row(row, IMAGE_COLUMNS)], [origin], folders=[folder])
        data, given = take_image_columns(data, self.format is not None, ())
        [row] = data.rows
        if self.format is None and (given or any(has_image_parts(row.get(name)) for name in MESSAGE_COLUMNS)):
            raise UserError(f"{origin}: has an image: {self.refusal}")
        return row, given[0] if given else []

    def show_row(
        self, values: dict, given: list, form: Format, folder: str, origin: str
    ) -> tuple[dict, list[ImageRef]]:
        """Return (a row that shows its images, these in their order).

        Args:
            values: the row in the columns of its format.
            given: the images of its columns.
            form: the format.
            folder: that paths are relative to.
            origin: begins each error.

        Raises UserError for an image that cannot be used or shown, and for texts that mean tokens of images.
        """
        self._check_texts(values, origin)
        has_marks = self.format is not None
        values, sources = show_images(values, given, has_marks, form, self.placeholder, origin)
        refs = [self.files.find(source, folder, origin) for source in sources]
        for ref in refs:
            self._check_shape(ref, origin)
        return values, refs

    def expand(self, text: str, refs: Sequence[ImageRef], origin: str) -> str:
        """Return a prompt's text with the text of each image's tokens in the place of its placeholder.

        Raises UserError, which begins with `origin`, if the text means other images than these.
        """
        if self.format is None:
            return text
        check_placeholders(text, len(refs), self.format, origin)
        return expand_images(Rendered(text, [], images=refs), self.format).text

    def check_text(self, text: str, origin: str) -> None:
        """Raise UserError, which begins with `origin`, if a text that shows no image means a token of one."""
        if self.format is not None:
            check_reserved(text, [*dict.fromkeys((self.placeholder, *self.format.reserved))], origin)

    def check_tokens(self, ids: Sequence[int], refs: Sequence[ImageRef], origin: str) -> None:
        """Raise UserError, which begins with `origin`, unless a prompt has the tokens of its images alone.

        The tokenizer may have made one of other characters. ids: of the prompt's tokens.
        """
        if self.format is None:
            return
        count = ids.count(self.format.token_id)
        expected = sum(self.format.count_tokens(ref.width, ref.height) for ref in refs)
        if count != expected:
            raise UserError(
                f"{origin}: has {count:,} tokens of images, and {expected:,} are those of its images"
            )

    def _check_texts(self, row: dict, origin: str) -> None:
        if self.format is not None:
            texts = dict.fromkeys((self.placeholder, *self.format.reserved))
            check_reserved(row, [text for text in texts if text != MARK], origin)

    def _check_shape(self, ref: ImageRef, origin: str) -> None:
        reason = self.format.refuse(ref.width, ref.height) if self.format else ""
        if reason:
            raise UserError(f"{origin}: has an image of {reason}")


def without_dataset_option() -> AbstractContextManager[None]:
    """Return a context in which UserErrors that begin with --dataset begin with the prompt's origin."""
    return reword_errors(lambda text: text.removeprefix("--dataset "))


def read_image_arguments(
    model: PreTrainedModel,
    prompts: Sequence[tuple[Sequence[int], Sequence[ImageRef]]],
    length: int,
    image_format: ImageFormat | None,
) -> dict[str, torch.Tensor]:
    """Return the arguments by which `generate` takes the images of a batch of prompts; {} if it has none.

    Args:
        model: the model.
        prompts: (token ids, images) of each.
        length: T, of the batch, which is padded on the left.
        image_format: how the model takes images; None = it takes none.

    Raises UserError for an image that cannot be read.
    """
    planned = plan_prompt_images(prompts, length, image_format, on_the_right=True)
    if planned is None:
        return {}
    device = next(model.parameters()).device
    with without_remedies():
        images = decode_images(planned)
    images = images.map_tensors(lambda tensor: tensor.to(device))
    return model.generation_inputs(images)  # type: ignore[operator]
