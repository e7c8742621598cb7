#!/bin/bash
#
# REPACK (CONCURRENTLY) takes a background worker slot, and waits for transactions
# of all databases.
#
# Version    PostgreSQL 19rc1, 19~rc1-1 of Debian experimental, on sid.
# Guess      REPACK runs in the session that asks for it, as VACUUM FULL does, and
#            waits for transactions that use the table, in its database. For logical
#            decoding it needs wal_level = logical.
# Behaviour  - The changes that come in meanwhile are decoded by a background worker
#              of its own, which comes from max_worker_processes.  When all slots
#              are taken (parallel queries, subscriptions, extensions) REPACK is an
#              error at once; it does not wait, and does not do it without.
#            - It begins by waiting for the end of every transaction of the cluster
#              that has written something: of other tables, of other databases, and
#              prepared ones.  Plain REPACK does not.
#            - wal_level = replica will do.  All sessions write WAL as for logical
#              decoding meanwhile, which the setting effective_wal_level shows.
#
set -euo pipefail

# shellcheck source=findings/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

version=19~rc1-1
[ "$(id -u)" = 0 ] || die "this takes root, for chroot"
cd "$folder"

# Sid's libraries can't be mixed with another release's, so all that the server
# depends on is unpacked into a folder in which it runs.
mkdir -p apt/parts apt/lists/partial apt/cache/archives/partial apt/preferences root/usr/{bin,sbin,lib,lib64}
# Its scripts and services are not run, so there is nothing to be configured.
for dir in bin sbin lib lib64; do
	ln -s "usr/$dir" "root/$dir"
done
mirror=$(apt-get indextargets --format "\$(ORIGIN)|\$(LABEL)|\$(REPO_URI)" 'Created-By: Packages' |
	sed -n '/^Debian|Debian|/{s///p;q}')
[ -n "$mirror" ] || die "apt knows no mirror of Debian here"
for suite in sid experimental; do
	printf 'deb [check-valid-until=no signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n' "$mirror" "$suite"
done >apt/sources.list
printf 'Package: src:postgresql-19\nPin: release a=experimental\nPin-Priority: 600\n' >apt/preferences/pin
: >apt/status
chmod -R a+rX .
private_apt() {
	apt-get -q -o Dir::Etc::SourceList="$folder/apt/sources.list" -o Dir::Etc::SourceParts="$folder/apt/parts" \
		-o Dir::Etc::PreferencesParts="$folder/apt/preferences" -o Dir::State::Lists="$folder/apt/lists" \
		-o Dir::State::Status="$folder/apt/status" -o Dir::Cache="$folder/apt/cache" \
		-o Debug::NoLocking=1 -o APT::Sandbox::User=root -o Acquire::Languages=none "$@"
}
{
	private_apt update &&
		private_apt --download-only --no-install-recommends --yes install \
			"postgresql-19=$version" "postgresql-client-19=$version" dash coreutils tzdata
} >apt.log 2>&1 || {
	tail -n 20 apt.log >&2
	die "version $version can't be had"
}
for deb in apt/cache/archives/*.deb; do
	dpkg --fsys-tarfile "$deb" | tar -x --keep-directory-symlink -C root
done
mkdir -p root/tmp root/dev root/data
mknod -m 666 root/dev/null c 1 3
mknod -m 666 root/dev/urandom c 1 9
echo 'nobody:x:65534:65534::/:/bin/sh' >root/etc/passwd
chown nobody root/data
servers+=("$folder/root/data")

inside() {
	chroot --userspec=65534:65534 root /usr/bin/env -i LC_ALL=C.UTF-8 PGHOST=/data PGUSER=postgres \
		PATH=/usr/lib/postgresql/19/bin:/usr/bin "$@"
}
show() {
	inside psql -X -q -A -t -d "${1:-postgres}" 2>&1
}
slots() {
	[ ! -e root/data/postmaster.pid ] || inside pg_ctl -D /data -w stop >/dev/null
	echo "max_worker_processes = $1" >>root/data/postgresql.conf
	inside pg_ctl -D /data -l /data/log -w start >/dev/null || die "the server does not start"
}

inside initdb -D /data -A trust -U postgres --no-sync --set dynamic_shared_memory_type=mmap >initdb.log 2>&1 || {
	cat initdb.log >&2
	die "initdb has failed"
}
cat >>root/data/postgresql.conf <<'CONF'
listen_addresses = ''
unix_socket_directories = '/data'
fsync = off
max_prepared_transactions = 2
CONF
# the launcher of logical replication has the only slot
slots 1
show <<'SQL'
CREATE TABLE items (id int PRIMARY KEY, note text);
INSERT INTO items SELECT i, repeat('x', 100) FROM generate_series(1, 1000) i;
CREATE DATABASE other;
SQL
expect "without a free slot" "$(show <<'SQL'
SHOW wal_level;
REPACK items;
REPACK (CONCURRENTLY) items;
SQL
)" <<'SEEN'
replica
ERROR:  out of background worker slots
HINT:  You might need to increase "max_worker_processes".
SEEN
slots 2
expect "with one" "$(show <<<'REPACK (CONCURRENTLY) items;')" <<<''

# In another database somebody has written something, and prepared it.
show other <<'SQL'
BEGIN;
CREATE TABLE elsewhere (id int);
PREPARE TRANSACTION 'elsewhere';
SQL
expect "a transaction in another database: plain REPACK" "$(show <<<"REPACK items; SELECT 'done'")" <<<'done'
expect "a transaction in another database: the concurrent one waits for it" "$(
	show <<<"SET statement_timeout = '60s'; REPACK (CONCURRENTLY) items; SELECT 'done';" >waiting &
	waiter=$!
	for _ in {1..300}; do
		[ "$(show <<<"SELECT count(*) FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'")" = 0 ] || break
		sleep 0.1
	done
	show <<'SQL'
SELECT backend_type, wait_event, current_setting('effective_wal_level')
FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE NOT granted;
SQL
	show other <<<"COMMIT PREPARED 'elsewhere'"
	wait "$waiter"
	cat waiting
)" <<'SEEN'
REPACK decoding worker|transactionid|logical
done
SEEN
inside pg_ctl -D /data -w -m fast stop >/dev/null
finish
