# shellcheck shell=bash
#
# What the scripts in dev/ share: packages, a sandbox, a server.
#
# A server refuses to run as root, and neither the checkout nor the machine's
# own PostgreSQL is ours to write to.  So everything happens in a sandbox: one
# temporary directory that holds a copy of the sources, a copy of PostgreSQL
# into which the extension is installed, the servers' data and the logs, all of
# it owned by an ordinary user.  Removing the directory removes every trace.
#
# A script that sources this file runs twice: outside the sandbox it installs
# packages and calls sandbox, which runs the script's copy inside and cleans
# up after it; inside, sandbox returns at once and the work begins.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=${SB_WORK:-}
keep=${SB_KEEP:-}
server_log=
# How long the tests and pg_ctl wait for what should happen, in seconds.
patience=180

# A server refuses to run as root; Debian's server package made this user.
tester=()
[ "$(id -u)" != 0 ] || tester=(setpriv --reuid=postgres --regid=postgres --init-groups)

say() {
	printf '== %s\n' "$*"
}

die() {
	printf '%s: %s\n' "${0##*/}" "$*" >&2
	exit 1
}

# run_job COMMAND...: runs it as a job of its own, so that one signal reaches all
# of it while we live on to clean up.  Sets status, and interrupted if a signal
# came.
run_job() {
	set -m
	"$@" </dev/null &
	child=$!
	set +m
	trap 'interrupted=yes; kill -TERM -- "-$child" 2>/dev/null || :' HUP INT TERM
	# A signal ends the wait, not the child.
	while
		status=0
		wait "$child" || status=$?
		kill -0 "$child" 2>/dev/null
	do :; done
}

# --- packages ---------------------------------------------------------------

# What building and testing takes besides PostgreSQL's own.
# shellcheck disable=SC2034 # used by the scripts that source this
test_packages=(gcc make libc6-dev perl libipc-run-perl pgbouncer)

is_installed() {
	# shellcheck disable=SC2016 # the braces are dpkg-query's
	[ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# same_version PACKAGE PACKAGE: are both installed, in one version?
same_version() {
	# shellcheck disable=SC2016 # the braces are dpkg-query's
	[ "$(dpkg-query -W -f '${db:Status-Status} ${Version}\n' "$@" 2>/dev/null | sort -u | wc -l)" = 1 ] &&
		is_installed "$2"
}

as_root() {
	if [ "$(id -u)" = 0 ]; then
		"$@"
	elif command -v sudo >/dev/null; then
		sudo "$@"
	else
		die "must be root, or have sudo, to run: $*"
	fi
}

# A package index that is partly out of reach may still hold all we need, so
# only the installation decides.
update_index() {
	as_root apt-get -qq update || say "apt-get update failed; going on"
	update_index() { :; }
}

# The newest major version with a server on this machine, or nothing.
installed_major() {
	local server
	for server in /usr/lib/postgresql/*/bin/postgres; do
		[ ! -x "$server" ] || basename "${server%/bin/postgres}"
	done | sort -n | tail -n 1
}

# The major version that this release of Debian or Ubuntu packages.
packaged_major() {
	apt-cache depends postgresql | sed -n 's/.*Depends: postgresql-\([0-9]*\)$/\1/p' | sort -n | tail -n 1
}

# In a subshell, so that its trap takes the configuration away again however
# the installation ends.  Debian's server package would create and start a
# cluster when it is first installed, and other packages would start services,
# which nobody asked us to do.
install_packages() (
	conf_dir=/etc/postgresql-common/createcluster.d
	conf=$conf_dir/statbuffer-dev.conf
	policy=/usr/sbin/policy-rc.d
	[ ! -e "$policy" ] || policy=
	trap 'as_root rm -f $conf $policy; as_root rmdir --ignore-fail-on-non-empty $conf_dir' EXIT
	as_root mkdir -p $conf_dir
	echo 'create_main_cluster = false' | as_root tee $conf >/dev/null
	if [ -n "$policy" ]; then
		printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
		as_root chmod 755 "$policy"
	fi
	as_root env DEBIAN_FRONTEND=noninteractive \
		apt-get -qq -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "$@" </dev/null >/dev/null
)

# need_packages PACKAGE...: installs those of them that are missing, and also
# PostgreSQL's own unless PG_CONFIG is set; then sets it.
need_packages() {
	local want=("$@") missing=() major package

	[ -z "$work" ] || return 0
	if [ -z "${PG_CONFIG:-}" ]; then
		major=$(installed_major)
		if [ -z "$major" ]; then
			update_index
			major=$(packaged_major)
			[ -n "$major" ] || die "found no package of PostgreSQL"
		fi
		want+=("postgresql-$major" "postgresql-server-dev-$major")
		# An older server may be there, and the headers of a newer minor
		# release are not for it.  What is named gets up to date.
		same_version "postgresql-$major" "postgresql-server-dev-$major" ||
			missing+=("postgresql-$major")
		# Not the one in /usr/bin: that is a wrapper which may speak of
		# another version.
		PG_CONFIG=/usr/lib/postgresql/$major/bin/pg_config
	fi
	for package in "${want[@]}"; do
		is_installed "$package" || missing+=("$package")
	done
	if [ ${#missing[@]} -gt 0 ]; then
		say "installing ${missing[*]}"
		update_index
		install_packages "${missing[@]}" || die "could not install ${missing[*]}"
	fi
}

# want_packages PACKAGE...: installs those of them that are missing and can be
# had.  The tests that need one skip themselves where it is not.
want_packages() {
	local package missing=()

	[ -z "$work" ] || return 0
	for package in "$@"; do
		is_installed "$package" || missing+=("$package")
	done
	[ ${#missing[@]} -gt 0 ] || return 0
	say "installing ${missing[*]}"
	update_index
	! (install_packages "${missing[@]}") || return 0
	# one after the other, because of those that cannot be had
	for package in "${missing[@]}"; do
		(install_packages "$package") || say "could not install $package; tests that need it are skipped"
	done
}

# --- the sandbox ------------------------------------------------------------

# What else is to be put into the sandbox before it is entered, with the caller's
# environment; scripts may define it anew.
fill_sandbox() {
	:
}

# sandbox ARGUMENT...: runs this script again in a sandbox, with these
# arguments, and exits as it does.  Inside, prepares PATH and returns.
#
# If $hand_back names a directory of the tree, its files replace those of the
# checkout in the end.
sandbox() {
	local script=dev/${0##*/}

	if [ -n "$work" ]; then
		# a script that another one runs inside
		[[ $PG_CONFIG != "$work"/* ]] || return 0
		say "copying $("$PG_CONFIG" --version)"
		copy_postgres
		return
	fi

	# Sockets live in here, and the path of a socket must be short.
	work=$(mktemp -d "${TMPDIR:-/tmp}/sb.XXXXXX")
	# For a PostgreSQL that was built with sanitizers: what they find ends the
	# process as a crash and is told in a file of its own.  Memory that a
	# process does not free before it ends is no leak to PostgreSQL; and it
	# measures the depth of its stack, so locals must be on the stack.
	export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=1:quarantine_size_mb=32:log_path=$work/log/san
	export UBSAN_OPTIONS=print_stacktrace=1:abort_on_error=1:log_path=$work/log/san
	trap leave_sandbox EXIT
	copy_sources
	fill_sandbox
	[ "$(id -u)" != 0 ] || chown -R postgres:postgres "$work"

	run_job enter_sandbox "$script" "$@"
	[ -z "${hand_back:-}" ] || take_back "$hand_back"
	exit "$status"
}

# The environment is emptied because libpq, PostgreSQL's makefiles and the tests
# all take settings from it.
enter_sandbox() {
	cd "$work/src" || exit
	exec "${tester[@]}" env -i \
		PATH=/usr/local/bin:/usr/bin:/bin HOME="$work" TMPDIR="$work/tmp" \
		LC_ALL=C.UTF-8 TERM="${TERM:-dumb}" PG_CONFIG="$PG_CONFIG" \
		PG_TEST_TIMEOUT_DEFAULT="$patience" PGCTLTIMEOUT="$patience" \
		ASAN_OPTIONS="$ASAN_OPTIONS" UBSAN_OPTIONS="$UBSAN_OPTIONS" \
		SB_WORK="$work" SB_KEEP="$keep" bash "$@"
}

# Whoever runs this, the files belong to whom the checkout belongs.
take_back() {
	[ -d "$work/src/$1" ] || return 0
	mkdir -p "$root/$1"
	cp -R "$work/src/$1/." "$root/$1"
	chown -R --reference="$root" "$root/$1" 2>/dev/null || :
}

# Whatever way the work ended, no server and no file of it stays.  Servers are
# known by their data directories, which are all in the sandbox.
leave_sandbox() {
	local pid_file bin

	trap '' HUP INT TERM
	[ -z "${child:-}" ] || kill -KILL -- "-$child" 2>/dev/null || :
	bin=$("$PG_CONFIG" --bindir)
	find "$work" -name postmaster.pid | while read -r pid_file; do
		(cd / && "${tester[@]}" "$bin/pg_ctl" stop -m immediate -D "${pid_file%/*}") >/dev/null 2>&1 || :
	done
	if [ -n "$keep" ]; then
		say "kept $work"
	else
		rm -rf "$work"
	fi
}

# The working tree as it is, committed or not, without what a build left there.
copy_sources() {
	mkdir "$work/src" "$work/tmp" "$work/log"
	tar -C "$root" -cf - --exclude=./.git --exclude='*.o' --exclude='*.bc' --exclude='*.so' \
		--exclude=./results --exclude=./output_iso --exclude='./tmp_check*' \
		--exclude='./regression.*' . | tar -C "$work/src" -xf -
}

# PostgreSQL finds its files relative to its executables.  So these are copied
# and the rest is linked, each to where the copied pg_config expects it.
copy_postgres() {
	local from=$PG_CONFIG bin option
	bin=$("$from" --bindir)

	mkdir -p "$work/pg$bin"
	cp -a "$bin/." "$work/pg$bin"
	PG_CONFIG=$work/pg$bin/pg_config
	PATH=$work/pg$bin:$PATH
	for option in --pkglibdir --sharedir; do
		mkdir -p "$("$PG_CONFIG" $option)"
		cp -as "$("$from" $option)/." "$("$PG_CONFIG" $option)"
	done
	# What is installed there of ours is not ours to write to, and an older one
	# has other files.
	find "$("$PG_CONFIG" --pkglibdir)" "$("$PG_CONFIG" --sharedir)/extension" \
		-depth -name 'statbuffer*' -exec rm -rf {} +
	for option in --includedir --pkgincludedir --includedir-server; do
		[ ! -e "$("$PG_CONFIG" $option)" ] || continue
		mkdir -p "$(dirname "$("$PG_CONFIG" $option)")"
		ln -s "$("$from" $option)" "$("$PG_CONFIG" $option)"
	done
}

# --- inside the sandbox -----------------------------------------------------

pgxs_make() {
	make --no-print-directory -C "$root" PG_CONFIG="$PG_CONFIG" "$@"
}

# start_server NAME SETTING...: a fresh cluster that only the sandbox can
# reach, and the environment that leads clients to it.
start_server() {
	local name=$1 data=$work/data-${1// /-} setting
	shift

	export PGDATA=$data PGHOST=$work/tmp PGPORT=5432 PGUSER=postgres PGDATABASE=postgres
	server_log=$work/log/server-${name// /-}.log
	# making one takes longer than copying it
	[ -d "$work/cluster" ] ||
		initdb -A trust -N -U postgres -E UTF8 --locale=C -D "$work/cluster" >"$work/log/initdb.log"
	cp -R "$work/cluster" "$data"
	{
		echo "listen_addresses = ''"
		echo "unix_socket_directories = '$PGHOST'"
		echo "max_connections = 100"
		echo "log_line_prefix = '%m [%p] %b %q%a '"
		for setting in "$@"; do
			echo "$setting"
		done
	} >>"$data/postgresql.conf"
	pg_ctl start -w -l "$server_log" >/dev/null || {
		cat "$server_log"
		return 1
	}
}

stop_server() {
	pg_ctl stop -w -m fast >/dev/null
	unset PGDATA PGHOST PGPORT PGUSER PGDATABASE
}
