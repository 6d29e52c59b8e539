"""Opening the images that a conversation file names, which may come from anywhere."""

from __future__ import annotations

import os
import stat
import warnings
from io import BytesIO
from pathlib import Path, PurePath

from PIL import Image, UnidentifiedImageError

from piip_core.errors import ConfigError
from piip_core.images import image_formats, spellings, upright

from ..image_processing import ImageError, rgb_image
from .records import DataError, Problem


class ImageFolder:
    """A folder of images, out of which no name leads.

    Args:
        root: The folder.
        follow_links: Whether a link below the folder may lead out of it. Such links are refused by default, because
            an unpacked archive can contain them; allow them for image sets that you linked into the folder yourself.

    Raises:
        ConfigError: If there is no such folder.
    """

    def __init__(self, root: str | os.PathLike[str], *, follow_links: bool = False) -> None:
        self.root = Path(os.path.abspath(root))
        self.follow_links = follow_links
        if not self.root.is_dir():
            raise ConfigError(f"image folder {str(root)!r} is no folder: give the one that image names are relative to")
        self._real_root = Path(os.path.realpath(self.root))

    def locate(self, name: str) -> Path:
        """Path of a non-empty file inside of the folder, relative to it or absolute, without "..".

        Where there is no such file, back-slashes count as slashes, and accents in Unicode's other form as these.

        Raises:
            DataError: If the name leads out of the folder, or there is no such file, or it is empty or no plain file.
        """
        path = self._inside(name)
        if not os.path.lexists(path):
            path = next((other for other in map(self._inside, spellings(name)) if os.path.isfile(other)), path)
        try:
            found = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            message = f"image {name!r} is missing in {self.root}: add it, or remove the entry"
            raise DataError(message, Problem.MISSING) from None
        except OSError as error:
            raise DataError(f"image {name!r} cannot be read: {error.strerror}", Problem.UNREADABLE) from error
        if not stat.S_ISREG(found.st_mode):
            raise DataError(f"image {name!r} is a folder or device, expected a file", Problem.UNREADABLE)
        if found.st_size == 0:
            raise DataError(f"image {name!r} is an empty file: load it again", Problem.EMPTY)
        return path

    def open(self, name: str, *, convert: bool = True, as_viewed: bool = False) -> Image.Image:
        """Reads an image, by content whatever its name ends in; see `locate` and `read_image`."""
        return read_image(self.locate(name), f"image {name!r}", convert=convert, as_viewed=as_viewed)

    def _inside(self, name: str) -> Path:
        fix = "expected a path below it without '..'; correct the entry"
        if ".." in PurePath(name.replace("\\", "/")).parts:
            raise DataError(f"image {name!r} may lead out of {self.root}: {fix}", Problem.OUTSIDE)
        path = self.root / name  # an absolute name replaces the root
        try:
            real = Path(os.path.realpath(path))
        except ValueError as error:  # a zero byte, half of a character
            raise DataError(f"image {name!r} is no file name ({error}): {fix}", Problem.OUTSIDE) from None
        if real.is_relative_to(self._real_root):
            return real
        if not path.is_relative_to(self.root) and not path.is_relative_to(self._real_root):
            raise DataError(f"image {name!r} lies outside of {self.root}: {fix}", Problem.OUTSIDE)
        if not self.follow_links:
            raise DataError(
                f"image {name!r} is behind a link from {self.root} to {real}: allow links (follow_links=True) "
                "if you made it, remove it otherwise",
                Problem.OUTSIDE,
            )
        return path


def read_image(source: Path | bytes, what: str, *, convert: bool = True, as_viewed: bool = False) -> Image.Image:
    """Reads an image (of an animation the first frame), and makes it RGB.

    As in the published training, unless `as_viewed`: transparency dropped, orientation tags ignored (but those of TIFF
    files, which Pillow itself follows).

    Args:
        source: The file, or its content.
        what: Its name in messages.
        convert: Make it RGB; otherwise it stays in the mode of the file.
        as_viewed: As `viewed_image` does.

    Raises:
        DataError: If the content is no complete image, is larger than Pillow's limit `PIL.Image.MAX_IMAGE_PIXELS`, or
            has values of unknown range.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transparency and metadata, neither of which is used
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            opened = Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=image_formats())
            with opened as image:
                image.load()
                if as_viewed:
                    return viewed_image(image)
                return rgb_image(image) if convert else image.copy()
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise DataError(
                f"{what}: {error}; make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it",
                Problem.TOO_LARGE,
            ) from None
        except UnidentifiedImageError:
            start = (source if isinstance(source, bytes) else source.read_bytes())[:16]
            raise DataError(
                f"{what} is no image (its content starts with {start!r}), expected JPEG, PNG or another image format: "
                "load it again",
                Problem.BROKEN,
            ) from None
        except ImageError as error:
            raise DataError(f"{what}: {error}", Problem.UNUSABLE) from None
        except MemoryError:
            raise
        except Exception as error:  # readers meet broken content with errors of many types
            if isinstance(error, OSError) and error.errno is not None:
                raise DataError(f"{what} cannot be read: {error.strerror}", Problem.UNREADABLE) from error
            reason = f"{what} is broken ({type(error).__name__}: {error}): load it again"
            raise DataError(reason, Problem.BROKEN) from error


def viewed_image(image: Image.Image) -> Image.Image:
    """An image as RGB as a viewer shows it: turned as its orientation tag says, transparency on white.

    For chat and own data; what the published models were trained and measured with is `rgb_image`.

    Raises:
        ImageError: As `rgb_image`.
    """
    image = upright(image)
    if not image.has_transparency_data or image.mode[0] in "IF":  # 16 and 32 bits, which Pillow would cut at 255
        return rgb_image(image)
    image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
