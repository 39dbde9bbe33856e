"""Photograph a report: python docs/figures/report.py osmfish_cortex.h5ad. It needs Chromium.

The file holds the cells of Codeluppi et al. (2018, doi:10.1038/s41592-018-0175-z), counts in X.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from pnmf_pyro.command_line.cli import main

if __name__ == "__main__":
    picture = Path(__file__).resolve().with_suffix(".png")
    with tempfile.TemporaryDirectory() as folder:
        counts = str(Path(sys.argv[1]).resolve())
        os.chdir(folder)  # the report names its file
        settings = ["--components", "4", "--size-factors", "total"]
        main(["fit", counts, *settings, "--out", "factors.h5ad"])
        main(["plot", "factors.h5ad", "--out", "report.html"])
        browser = ["chromium", "--headless", "--no-sandbox", "--hide-scrollbars"]
        shot = ["--window-size=740,950", f"--screenshot={picture}", "report.html"]
        subprocess.run([*browser, *shot], check=True)
    Image.open(picture).convert("RGB").quantize(128, kmeans=1).save(picture, optimize=True)
