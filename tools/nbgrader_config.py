"""nbgrader's configuration, for the release, for grading and for the pages of `make mark`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from homework import CODE_BLANK, TEXT_BLANK  # noqa: E402

c = get_config()  # noqa: F821
c.NbGraderAPI.log_level = "ERROR"
c.ClearSolutions.code_stub = {"python": CODE_BLANK}
c.ClearSolutions.text_stub = TEXT_BLANK
c.Autograde.sanitize_preprocessors = []
c.Autograde.autograde_preprocessors = [
    "preprocessors.Judge",
    "nbgrader.preprocessors.SaveAutoGrades",
    "nbgrader.preprocessors.AssignLatePenalties",
]
# What a student hands in must not run in the browser of whoever marks it.
c.HTMLExporter.sanitize_html = True
c.NbConvertBase.display_data_priority = "image/png image/jpeg text/plain".split()  # no HTML of an output
c.HTMLExporter.filters = {"markdown2html": "preprocessors.safe_markdown"}
