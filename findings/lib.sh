# shellcheck shell=bash
#
# What the findings share: PostgreSQL as Debian packages it, in a temporary
# folder of its own, and a comparison of what is seen with what was seen.
#
# A script sources this, then calls need, get, and the rest.  The folder and
# the servers in it are gone when the script ends.

folder=$(mktemp -d)
servers=()
user=()
# A server refuses to run as root.
[ "$(id -u)" != 0 ] || user=(setpriv --reuid=nobody --regid=nogroup --clear-groups)

die() {
	printf '%s: %s\n' "${0##*/}" "$*" >&2
	exit 2
}

leave() {
	local data
	for data in "${servers[@]}"; do
		[ ! -e "$data/postmaster.pid" ] || kill -QUIT "$(head -n 1 "$data/postmaster.pid")" 2>/dev/null || :
	done
	rm -rf "$folder"
}
trap leave EXIT
trap 'exit 2' HUP INT TERM

# need CODENAME: the packages are for that release of Debian.
need() {
	# shellcheck disable=SC1091 # the system's
	[ "$(. /etc/os-release && printf %s "$VERSION_CODENAME")" = "$1" ] || die "this takes Debian $1"
	cd "$folder" || die "no temporary folder"
	mkdir debs
	if [ "$(id -u)" = 0 ]; then
		chown nobody:nogroup . debs
	fi
}

# get MAJOR VERSION: the server, its programs and what they are linked with,
# in $folder/VERSION.
get() {
	local major=$1 version=$2 deb
	local libraries=(libicu72 libldap-2.5-0 libpq5 libxml2 libxslt1.1)

	(
		cd debs
		apt-get -q download "postgresql-$major=$version" "postgresql-client-$major=$version" "${libraries[@]}"
	) >apt.log 2>&1 || {
		cat apt.log >&2
		die "version $version can't be had: its packages are gone, or apt does not know them (apt-get update)"
	}
	for deb in debs/postgresql*"_${version}_"*.deb debs/lib*.deb; do
		dpkg -x "$deb" "$version"
	done
	chmod -R a+rX "$version"
}

# run VERSION PROGRAM ARGUMENT...: one of its programs
run() {
	local programs
	programs=$(echo "$folder/$1"/usr/lib/postgresql/*/bin)

	"${user[@]}" env -u PGOPTIONS -u PGSERVICE LC_ALL=C.UTF-8 HOME="$folder" PGHOST="$folder" PGUSER=postgres \
		PGDATABASE=postgres LD_LIBRARY_PATH="$folder/$1/usr/lib/$(uname -m)-linux-gnu" "$programs/$2" "${@:3}"
}

# make VERSION NAME: a cluster
make() {
	run "$1" initdb -D "$folder/$2" -A trust -U postgres --no-sync >initdb.log 2>&1 || {
		cat initdb.log >&2
		die "initdb has failed"
	}
	servers+=("$folder/$2")
	cat >>"$2/postgresql.conf" <<-CONF
		listen_addresses = ''
		unix_socket_directories = '$folder'
		fsync = off
		jit = off
	CONF
}

# start VERSION NAME: the server of that version on that cluster
start() {
	run "$1" pg_ctl -D "$folder/$2" -l "$folder/$2.log" -w start >/dev/null || {
		cat "$2.log" >&2
		die "the server of version $1 does not start"
	}
}

stop() {
	run "$1" pg_ctl -D "$folder/$2" -w stop >/dev/null
}

# sql VERSION: statements from the standard input, each with what it shows
sql() {
	run "$1" psql -X -q -A -t -v ON_ERROR_STOP=0 -v VERBOSITY="${verbosity:-default}" 2>&1
}

# expect WHAT SEEN: compares what is seen with the standard input
failed=0
expect() {
	if diff -u --label "what was seen" --label "what is seen now" - <(printf '%s\n' "$2"); then
		printf 'as it was: %s\n' "$1"
	else
		printf 'CHANGED: %s\n' "$1"
		failed=1
	fi
}

# finish: says whether all is as it was
finish() {
	[ "$failed" = 0 ] || exit 1
}
