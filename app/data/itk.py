"""SimpleITK, quiet: the one reader of every medical image format here."""

from __future__ import annotations

import SimpleITK as sitk

# ITK writes warnings about single files straight to stderr, header text included; what matters is said in our notes.
sitk.ProcessObject.SetGlobalWarningDisplay(False)


def image_reader(image_io: str) -> sitk.ImageFileReader:
    """A reader bound to one ITK format class, so that no file is parsed as something that its name does not say."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO(image_io)
    reader.LoadPrivateTagsOff()
    return reader
