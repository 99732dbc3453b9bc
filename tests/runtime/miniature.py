"""A llama-cpp-python in miniature: the same layout and targets, compiled in seconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mobe_gguf.runtime.build import BuildRecipe
from mobe_gguf.runtime.compile import LIBRARIES, TOOLS, BuildOptions
from mobe_gguf.runtime.source import Pin

CMAKE = f"""
cmake_minimum_required(VERSION 3.21)
project(miniature C)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${{CMAKE_BINARY_DIR}}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${{CMAKE_BINARY_DIR}}/bin)
add_library(llama SHARED src/llama.c)
set_target_properties(llama PROPERTIES VERSION 0.1.0 SOVERSION 0)
add_library(mtmd SHARED src/mtmd.c)
if (GGML_MOBE_DIR AND EXISTS ${{GGML_MOBE_DIR}}/kernel.c)
    target_sources(llama PRIVATE ${{GGML_MOBE_DIR}}/kernel.c)
    target_compile_definitions(llama PRIVATE KERNEL)
endif()
foreach(tool {" ".join(TOOLS)})
    add_executable(${{tool}} src/tool.c)
    target_link_libraries(${{tool}} PRIVATE llama)
endforeach()
"""

LLAMA_C = """\
/* stands for libllama */
#ifdef KERNEL
extern int kernel(void);
#else
static int kernel(void) { return 0; }
#endif
int answer(void) {
    return 40 + kernel();
}
"""

# a build backend of its own: pip reads the metadata without fetching anything
BACKEND = """\
from pathlib import Path
def prepare_metadata_for_build_wheel(directory, config_settings=None):
    info = Path(directory) / "llama_cpp_python-9.9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(Path("PKG-INFO").read_text())
    return info.name
def build_wheel(*args):
    raise NotImplementedError
"""

FILES = {
    "PKG-INFO": "Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 9.9.9\nSummary: miniature\n",
    "LICENSE.md": "MIT\n",
    "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n',
    "backend.py": BACKEND,
    "llama_cpp/__init__.py": "answer = 42\n",
    ".git/HEAD": "ref: refs/heads/main\n",
    "vendor/llama.cpp/CMakeLists.txt": CMAKE,
    "vendor/llama.cpp/LICENSE": "MIT\n",
    "vendor/llama.cpp/convert_hf_to_gguf.py": "",
    "vendor/llama.cpp/conversion/__init__.py": "",
    "vendor/llama.cpp/gguf-py/gguf/__init__.py": "",
    "vendor/llama.cpp/include/llama.h": "int answer(void);\n",
    "vendor/llama.cpp/ggml/include/ggml.h": "",
    "vendor/llama.cpp/models/templates/x.jinja": "",
    "vendor/llama.cpp/src/llama.c": LLAMA_C,
    "vendor/llama.cpp/src/mtmd.c": "int mtmd(void) { return 0; }\n",
    "vendor/llama.cpp/src/tool.c": '#include <stdio.h>\nint answer(void);\nint main(void) { printf("%d\\n", answer()); }\n',
}

#: A patch that makes every tool print 41.
PATCH = """\
diff --git a/vendor/llama.cpp/src/llama.c b/vendor/llama.cpp/src/llama.c
--- a/vendor/llama.cpp/src/llama.c
+++ b/vendor/llama.cpp/src/llama.c
@@ -5,5 +5,5 @@
 static int kernel(void) { return 0; }
 #endif
 int answer(void) {
-    return 40 + kernel();
+    return 41 + kernel();
 }
"""

#: Ninja's steps for a build of all: an object and a link each, and the version links of libllama.
ALL_STEPS = 2 * (len(LIBRARIES) + len(TOOLS)) + 1


@dataclass(frozen=True)
class Miniature:
    """A pinned archive and a cache directory that holds it."""

    pin: Pin
    cache: Path
    archive: bytes

    def recipe(self, patches: tuple[Path, ...] = (), kernels: Path | None = None) -> BuildRecipe:
        return BuildRecipe(BuildOptions(), patches, kernels, self.pin)
