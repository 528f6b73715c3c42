# meshkitfs: `make mount` gives a newcomer a working mount, `make test` runs everything.
# Every target can be run again; what is there already is left alone.

# The first Python that is new enough: python3 where that is, else a versioned one.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 /usr/bin/python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
MESHKITFS := $(BIN)/meshkitfs
# Where `make mount` mounts, and what its first share is called.
MOUNT ?= $(HOME)/MeshKit
SHARE ?= first
# How many test files run at a time: they wait for disks and servers more than for processors. 0 for a debugger.
TEST_WORKERS ?= 3
# More arguments for pytest: make test PYTEST_ARGS='-k gate -x'
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install install-test mount umount test test-long lint format docs bench clean \
	packages packages-test packages-bench test-servers

help:
	@echo 'make mount      install what is missing, create an identity and a first share, mount at ~/MeshKit'
	@echo 'make umount     send what is unsent, and unmount'
	@echo 'make test       run the whole test suite (make test-long: also what takes minutes)'
	@echo 'make lint       ruff, mypy --strict and the import contract'
	@echo 'make docs       write the manual pages and the synopses of docs/cli.md anew'
	@echo 'make bench      compare with other encrypted filesystems on this machine'
	@echo 'make install    only install into $(VENV)'
	@echo 'make clean      remove $(VENV) and caches; identities and data are not touched'

# --- system packages -------------------------------------------------------------------------------------
# Asked of what is there, not of the package list: a Python from elsewhere needs no python3-dev, and a
# machine where everything is present needs neither root nor a network.

APT_INSTALL = $(if $(filter 0,$(shell id -u)),,sudo) env DEBIAN_FRONTEND=noninteractive apt-get
define install-packages
	missing=$$(echo $$missing); \
	if [ -n "$$missing" ]; then \
		echo "installing: $$missing"; \
		if ! command -v apt-get >/dev/null; then \
			echo "error: this is not Debian or Ubuntu; install the equivalents of: $$missing" >&2; exit 1; fi; \
		if [ "$$(id -u)" != 0 ] && ! command -v sudo >/dev/null; then \
			echo "error: run this as root: apt-get install $$missing" >&2; exit 1; fi; \
		$(APT_INSTALL) install -y --no-install-recommends $$missing || \
		{ $(APT_INSTALL) update && $(APT_INSTALL) install -y --no-install-recommends $$missing; } || exit 1; \
	fi
endef
# $(call need,COMMAND,PACKAGE): the package, if the command is not there
need = command -v $(1) >/dev/null || missing="$$missing $(2)";

packages:
	@missing=; \
	$(call need,fusermount3,fuse3) $(call need,getfattr,attr) \
	$(call need,gcc,gcc libc6-dev) \
	$(call need,pkg-config,pkg-config) \
	if ! command -v pkg-config >/dev/null || ! pkg-config --exists fuse3; then \
		missing="$$missing libfuse3-dev"; fi; \
	if [ -z '$(PYTHON)' ]; then missing="$$missing python3 python3-dev python3-venv"; else \
		$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing python3-venv"; \
		$(PYTHON) -c 'import os, sysconfig as s; os.stat(s.get_path("include") + "/Python.h")' 2>/dev/null || \
			missing="$$missing python3-dev"; fi; \
	$(install-packages)

packages-test: packages
	@missing=; \
	$(call need,git,git) $(call need,sqlite3,sqlite3) $(call need,rsync,rsync) $(call need,tar,tar) \
	if ! command -v vim >/dev/null && ! command -v vim.tiny >/dev/null; then missing="$$missing vim-tiny"; fi; \
	$(call need,groff,groff-base) $(call need,ps,procps) $(call need,flock,util-linux) $(call need,ip,iproute2) \
	$(call need,dbus-run-session,dbus) $(call need,gnome-keyring-daemon,gnome-keyring) \
	$(call need,systemctl,systemd) \
	$(call need,swtpm,swtpm) $(call need,keyctl,keyutils) \
	pkg-config --exists tss2-esys 2>/dev/null || missing="$$missing libtss2-dev"; \
	ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || $(call need,postgres,postgresql) \
	$(install-packages)

packages-bench: packages
	@missing=; \
	$(call need,encfs,encfs) $(call need,cryfs,cryfs) \
	$(install-packages)

# --- the virtual environment -----------------------------------------------------------------------------

install: $(VENV)/.installed

install-test: packages-test $(VENV)/.installed-test test-servers

# Real servers for the tests of byte providers; about a minute, once. Without a network the tests that need them
# are skipped, and say so.
test-servers: $(VENV)/.installed-test
	@$(BIN)/python tests/servers/install.py $(VENV)/servers

$(VENV)/.installed: pyproject.toml
	@$(MAKE) --no-print-directory packages
	@$(MAKE) --no-print-directory venv-checked
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml
	@$(MAKE) --no-print-directory venv-checked
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test]'
	@$(BIN)/pip install --quiet --disable-pip-version-check -e '.[tpm]' || \
		echo 'tpm2-pytss could not be built: the tests of the TPM will be skipped' >&2
	@touch $@ $(VENV)/.installed

# Its own make, so that a Python which `packages` has just installed is seen. A half-made environment, or
# one whose Python has gone, is made again.
.PHONY: venv-checked
venv-checked:
	@if [ -z '$(PYTHON)' ]; then echo 'error: Python 3.11 or newer is needed' >&2; exit 1; fi
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)

# --- using it --------------------------------------------------------------------------------------------

# The key vault: the session's keyring if it can be used. There is nobody to ask for a passphrase here, so
# otherwise the keys lie in an unprotected file, and that is said loudly. `meshkitfs init` is not fooled by
# this file: it never chooses the unprotected one by itself.
mount: install
	@$(MESHKITFS) init --if-needed --key-vault secret-service >/dev/null 2>&1 || { \
		$(MESHKITFS) init --if-needed --key-vault plain-file 2>/dev/null && { \
		echo; \
		echo '  *** WARNING ********************************************************************'; \
		echo '  This session has no keyring that can be used, so the private keys of this'; \
		echo '  identity are in an UNPROTECTED file: whoever can read your files, or a backup'; \
		echo '  of them, can be you. For anything but a trial, choose a passphrase:'; \
		echo '    export MESHKITFS_HOME=~/.local/share/meshkitfs-safe'; \
		echo '    $(MESHKITFS) init --key-vault passphrase-file'; \
		echo '  ********************************************************************************'; \
		echo; } >&2; } || $(MESHKITFS) init --if-needed --key-vault plain-file
	@mkdir -p -m 700 '$(MOUNT)' 2>/dev/null || true
	@$(MESHKITFS) mount '$(MOUNT)'
	@$(MESHKITFS) share create '$(SHARE)' --if-needed
	@echo
	@echo 'Try:'
	@echo '  cp -a README.md $(MOUNT)/$(SHARE)/        put something into your first share'
	@echo '  getfattr -d -m - $(MOUNT)/$(SHARE)        see what is known about it'
	@echo '  mkdir $(MOUNT)/notes                      make another share'
	@echo '  $(MESHKITFS) status                  see what is mounted, shared and unsent'
	@echo '  $(MESHKITFS) share add --help        share with someone'
	@echo '  make umount'

umount:
	@if [ -x $(MESHKITFS) ]; then $(MESHKITFS) umount --if-needed; fi

# --- checking it -----------------------------------------------------------------------------------------

test: install-test
	$(BIN)/python -m pytest -q -m 'not long' -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-long: install-test
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)

lint: install-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The manual pages, and the synopses in docs/cli.md, from the grammar of the command line.
docs: install
	$(BIN)/python -m meshkitfs.cli.reference

bench: packages-bench install-test
	$(BIN)/python benchmarks/compare.py $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
	rm -rf -- *.egg-info
