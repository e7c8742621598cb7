# The world of the crash test: durable buffers, what sessions count in them, and
# what disturbs that.
#
# What a transaction counts it also writes to the table "book".  So when nobody
# counts, for each key
#
#	book = stored + held
#
# whatever was killed before.  Two kinds of keys are only bounded: what was
# discarded because its handler failed (buffer "once") is in the book and nowhere
# else; and an increment outside of the transaction (sb_async_increment()) is
# written to the book before it is made ("begun"), and again, as "ended", by the
# transaction that makes it, which may roll back.  It is in WAL before that
# transaction's commit, so it is there if that is.
#
# TRUNCATE discards what is held, in a transaction that has the buffer for itself:
# it makes the book what is stored.

package CrashesWorld;

use strict;
use warnings;

use Exporter 'import';

our @EXPORT = qw(world_sql script_weights random_disturbance sum_up_sql off_sql off_locked_sql held_sql @buffers);

# Those that are drained in the end.
our @buffers = qw(hits handled rare once);

sub world_sql
{
	return q{
CREATE EXTENSION statbuffer;

-- what was committed, since it was added up last, and before; and how many calls
-- that took
CREATE TABLE book (buffer text, key text, n bigint, calls int NOT NULL DEFAULT 1);
CREATE TABLE books (buffer text, key text, n bigint, calls bigint, PRIMARY KEY (buffer, key));

-- into a table; into another one, where most is held for long
CREATE TABLE target (key text PRIMARY KEY, n bigint NOT NULL DEFAULT 0);
SELECT sb_create('hits', 'target', 'n', 'durable=true', 'interval=300ms', 'jitter=300ms', 'backoff=50ms');
CREATE TABLE rare_target (LIKE target INCLUDING ALL);
SELECT sb_create('rare', 'rare_target', 'n', 'durable=true', 'interval=1h', 'backoff=50ms');

-- by handlers that fail now and then: what one has failed with is tried again, or
-- is discarded
CREATE TABLE stored (buffer text, key text, n bigint NOT NULL, PRIMARY KEY (buffer, key));
CREATE TABLE mood (failing float8);
INSERT INTO mood VALUES (0.05);
CREATE SEQUENCE failed;
CREATE FUNCTION store(b text, keys text[], counts bigint[]) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
	draw float8 := random() / greatest((SELECT failing FROM public.mood), 1e-9);
BEGIN
	INSERT INTO public.stored AS s SELECT b, k, n FROM unnest(keys, counts) AS u (k, n)
	ON CONFLICT (buffer, key) DO UPDATE SET n = s.n + EXCLUDED.n;
	IF draw < 1 THEN
		PERFORM nextval('public.failed');
	END IF;
	IF draw < 0.3 THEN
		RAISE 'failed';
	ELSIF draw < 0.6 THEN
		RAISE 'as if it collided' USING ERRCODE = 'deadlock_detected';
	END IF;
	RETURN draw >= 1;
END $$;
CREATE FUNCTION store_handled(keys text[], counts bigint[]) RETURNS boolean LANGUAGE sql
AS $$ SELECT public.store('handled', keys, counts) $$;
CREATE FUNCTION store_once(key int, count bigint) RETURNS boolean LANGUAGE sql
AS $$ SELECT public.store('once', ARRAY[key::text], ARRAY[count]) $$;
CREATE FOREIGN TABLE handled (key text NOT NULL, n bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'store_handled', interval '50ms', backoff '20ms', durable 'true', batch_size '20');
CREATE FOREIGN TABLE once (key int NOT NULL, n bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'store_once', interval '50ms', backoff '20ms', restart 'temporary', durable 'true', batch_size '50');

};
}

# What each key has.  No view: that would keep key columns from being altered.
my $sums = q{
WITH sums AS MATERIALIZED (
	SELECT buffer, key, coalesce(sum(booked), 0) AS booked, coalesce(sum(stored), 0) AS stored, coalesce(sum(held), 0) AS held FROM (
		SELECT buffer, key, n AS booked, NULL::bigint AS stored, NULL::bigint AS held FROM book
		UNION ALL SELECT buffer, key, n, NULL, NULL FROM books
		UNION ALL SELECT 'hits', key, NULL, n, NULL FROM target
		UNION ALL SELECT 'hits', key, NULL, NULL, n FROM hits
		UNION ALL SELECT 'rare', key, NULL, n, NULL FROM rare_target
		UNION ALL SELECT 'rare', key, NULL, NULL, n FROM rare
		UNION ALL SELECT buffer, key, NULL, n, NULL FROM stored
		UNION ALL SELECT 'handled', key, NULL, NULL, n FROM handled
		UNION ALL SELECT 'once', key::text, NULL, NULL, n FROM once) AS all_of_them
	GROUP BY buffer, key)
};

# The keys that are off.
sub off_sql
{
	return $sums . q{
SELECT buffer, key, booked, stored, held FROM sums WHERE CASE
	WHEN buffer IN ('begun', 'ended', 'discarded') THEN false
	WHEN buffer = 'once' THEN stored + held NOT BETWEEN 0 AND booked
	WHEN key LIKE 'async%' THEN stored + held NOT BETWEEN
		coalesce((SELECT booked FROM sums s WHERE s.buffer = 'ended' AND s.key = sums.key), 0) AND
		coalesce((SELECT booked FROM sums s WHERE s.buffer = 'begun' AND s.key = sums.key), 0)
	ELSE booked <> stored + held END;
};
}

# The same where no flush can be between what is stored and what is held: one that
# stores has locked the table until the buffer knows of it.  To be run in one
# transaction.
sub off_locked_sql
{
	return "LOCK TABLE target, rare_target, stored IN EXCLUSIVE MODE;\n" . off_sql();
}

# How much is held, without its sign.
sub held_sql { return "$sums SELECT coalesce(sum(abs(held)), 0) FROM sums"; }

# Adds up the book, so that looking at it does not take longer and longer.
sub sum_up_sql
{
	return q{
WITH d AS (DELETE FROM book RETURNING *)
INSERT INTO books AS b SELECT buffer, key, sum(n), sum(calls) FROM d GROUP BY 1, 2
ON CONFLICT (buffer, key) DO UPDATE SET n = b.n + EXCLUDED.n, calls = b.calls + EXCLUDED.calls;
};
}

my %scripts = (
	simple => [ 10, q{
\set k random(1, 200)
\set n random(1, 5)
BEGIN;
INSERT INTO book VALUES ('hits', 'key ' || :k, :n), ('handled', 'key ' || :k, 1), ('once', :k, 1);
SELECT sb_increment('key ' || :k, :n, 'hits'), sb_increment(:k::int, 1, 'once');
INSERT INTO handled VALUES ('key ' || :k, 1);
COMMIT;
} ],
	savepoint => [ 5, q{
\set k random(1, 200)
BEGIN;
SAVEPOINT a;
INSERT INTO hits VALUES ('key ' || :k, 100);
ROLLBACK TO a;
INSERT INTO hits VALUES ('key ' || :k, -1), ('more ' || :k, 3);
INSERT INTO book VALUES ('hits', 'key ' || :k, -1), ('hits', 'more ' || :k, 3);
COMMIT;
} ],
	rollback => [ 3, q{
\set k random(1, 200)
BEGIN;
INSERT INTO book VALUES ('hits', 'key ' || :k, 7), ('rare', 'key ' || :k, 7);
INSERT INTO hits VALUES ('key ' || :k, 7);
INSERT INTO rare VALUES ('key ' || :k, 7);
ROLLBACK;
} ],
	rare => [ 5, q{
\set k random(1, 20000)
BEGIN;
INSERT INTO book SELECT 'rare', 'rare ' || i, 1 FROM generate_series(:k, :k + 20) AS i;
INSERT INTO rare SELECT 'rare ' || i, 1 FROM generate_series(:k, :k + 20) AS i;
COMMIT;
} ],
	bulk => [ 3, q{
\set k random(1, 400)
BEGIN;
INSERT INTO book SELECT 'hits', 'bulk ' || i, 1 FROM generate_series(:k, :k + 299) AS i;
INSERT INTO hits SELECT 'bulk ' || i, 1 FROM generate_series(:k, :k + 299) AS i;
COMMIT;
} ],
	hot => [ 4, q{
\set k random(1, 5)
\set n random(1, 400)
BEGIN;
SELECT count(sb_increment('hot ' || :k, i, 'handled')) FROM generate_series(1, :n) AS i;
INSERT INTO book VALUES ('handled', 'hot ' || :k, :n * (:n + 1) / 2, :n);
COMMIT;
} ],
	async => [ 4, q{
\set k random(1, 3)
INSERT INTO book VALUES ('begun', 'async ' || :k, 1, 0);
BEGIN;
SELECT sb_async_increment('async ' || :k, 1, 'rare');
INSERT INTO book VALUES ('ended', 'async ' || :k, 1);
COMMIT;
} ],
	async_undone => [ 2, q{
\set k random(1, 3)
INSERT INTO book VALUES ('begun', 'async ' || :k, 1, 0);
BEGIN;
INSERT INTO book VALUES ('ended', 'async ' || :k, 1);
SELECT sb_async_increment('async ' || :k, 1, 'rare');
ROLLBACK;
} ],
	prepared => [ 3, q{
\set k random(1, 200)
\set c random(1, 1000000000)
BEGIN;
INSERT INTO book VALUES ('handled', 'key ' || :k, 2), ('rare', 'key ' || :k, 2), ('once', :k, 2);
INSERT INTO handled VALUES ('key ' || :k, 2);
INSERT INTO rare VALUES ('key ' || :k, 2);
INSERT INTO once VALUES (:k, 2);
PREPARE TRANSACTION 't:c';
COMMIT PREPARED 't:c';
} ],
	prepared_undone => [ 1, q{
\set k random(1, 200)
\set c random(1, 1000000000)
BEGIN;
INSERT INTO book VALUES ('hits', 'key ' || :k, 1000);
INSERT INTO hits VALUES ('key ' || :k, 1000);
PREPARE TRANSACTION 't:c';
ROLLBACK PREPARED 't:c';
} ]);

# What is left prepared keeps others from altering the buffer.
my $open = q{
\set k random(1, 200)
\set c random(1, 1000000000)
BEGIN;
INSERT INTO book SELECT 'BUFFER', 'open ' || i, 1 FROM generate_series(:k, :k + 20) AS i;
INSERT INTO BUFFER SELECT 'open ' || i, 1 FROM generate_series(:k, :k + 20) AS i;
\if random(1, 50) = 1
PREPARE TRANSACTION 'open:c';
\else
COMMIT;
\endif
};

# script_weights(BUFFER): scripts for pgbench, each with its name, weight and text.
# Some transactions that count in this buffer, if any, are left prepared.
sub script_weights
{
	my ($buffer) = @_;
	my @list = map { [ $_, @{ $scripts{$_} } ] } sort keys %scripts;

	push @list, [ "open_$buffer", 4, $open =~ s/BUFFER/$buffer/gr ] if defined $buffer;
	return @list;
}

sub any { return $_[ int rand @_ ]; }

# Discards what the buffer holds.
sub truncate_sql
{
	my ($buffer) = @_;
	my $stored = $buffer eq 'hits' ? 'target' : "stored WHERE buffer = '$buffer'";

	return qq{BEGIN;
		TRUNCATE $buffer;
		INSERT INTO books AS b
			SELECT 'discarded', '', 0, coalesce((SELECT sum(calls) FROM book WHERE buffer = '$buffer'), 0)
				+ coalesce((SELECT sum(calls) FROM books WHERE buffer = '$buffer'), 0)
			ON CONFLICT (buffer, key) DO UPDATE SET calls = b.calls + EXCLUDED.calls;
		DELETE FROM book WHERE buffer = '$buffer';
		DELETE FROM books WHERE buffer = '$buffer';
		INSERT INTO books SELECT '$buffer', key, n, 0 FROM $stored;
		COMMIT};
}

my $ours = q{backend_type LIKE 'statbuffer%'};
my $sessions = q{application_name = 'load'};

# What happens while sessions count: what the figures call it, and statements that
# may fail; and one that must follow them, and is to be repeated until it works.
my @disturbances = (
	[ 'durable set off and on', sub {
		my $buffer = any('hits', 'handled', 'rare');
		("ALTER FOREIGN TABLE $buffer OPTIONS (SET durable 'false')", "ALTER FOREIGN TABLE $buffer OPTIONS (SET durable 'true')") } ],
	[ 'durable set off and on in a transaction', sub {
		my $buffer = any('hits', 'handled', 'rare');
		"BEGIN; ALTER FOREIGN TABLE $buffer OPTIONS (SET durable 'false'); ALTER FOREIGN TABLE $buffer OPTIONS (SET durable 'true'); "
		  . any('COMMIT', 'ROLLBACK') } ],
	[ 'key columns altered', sub {
		'ALTER FOREIGN TABLE handled ALTER COLUMN key TYPE ' . any('text', 'varchar(100)', 'varchar') } ],
	[ 'key columns altered while durable is off', sub {
		"BEGIN; ALTER FOREIGN TABLE handled OPTIONS (SET durable 'false'); ALTER FOREIGN TABLE handled ALTER COLUMN key TYPE "
		  . any('text', 'varchar(100)', 'varchar') . "; ALTER FOREIGN TABLE handled OPTIONS (SET durable 'true'); "
		  . any('COMMIT', 'ROLLBACK') } ],
	[ 'buffers locked for a while', sub {
		'BEGIN; ALTER FOREIGN TABLE ' . any(@buffers) . ' OWNER TO CURRENT_USER; SELECT pg_sleep(' . any(0.5, 3) . '); COMMIT' } ],
	[ 'options altered', sub {
		'ALTER FOREIGN TABLE ' . any(@buffers) . ' OPTIONS ' . any(
			"(SET interval '20ms')", "(SET interval '500ms')", "(SET interval '1h')", "(SET backoff '1s')", "(SET backoff '20ms')") } ],
	[ 'options altered', sub {
		'ALTER FOREIGN TABLE handled OPTIONS ' . any("(SET batch_size '1')", "(SET batch_size '1000')", "(SET batch_size '20')") } ],
	[ 'drains', sub { "SELECT sb_drain('" . any(@buffers) . "', '2s')" } ],
	[ 'flushes', sub { "SELECT sb_flush_all('" . any(@buffers) . "')" } ],
	[ 'buffers truncated', sub { truncate_sql(any('hits', 'handled')) } ],
	[ 'buffers truncated, and not', sub {
		my $buffer = any(@buffers);
		any("BEGIN; TRUNCATE $buffer; ROLLBACK", "BEGIN; SAVEPOINT s; TRUNCATE $buffer; ROLLBACK TO s; COMMIT") } ],
	[ 'vacuums', sub { any('VACUUM FREEZE', 'VACUUM', 'CHECKPOINT') } ],
	[ 'looks', sub { 'SELECT count(*) FROM ' . any(@buffers) . '; TABLE sb_stat_buffers' } ],
	[ 'processes of ours terminated', sub { "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE $ours" } ],
	[ 'processes of ours cancelled', sub { "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE $ours" } ],
	[ 'sessions cancelled', sub {
		"SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE $sessions ORDER BY random() LIMIT 1" } ],
	[ 'sessions terminated', sub {
		"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE $sessions ORDER BY random() LIMIT 1" } ],
	[ 'moods changed', sub { 'UPDATE mood SET failing = ' . any(0, 0.01, 0.1, 0.5) } ],
	[ 'prepared transactions ended under load', sub {
		"SELECT format('" . any('COMMIT', 'ROLLBACK') . " PREPARED %L', gid) FROM pg_prepared_xacts WHERE gid LIKE 'open%' LIMIT 3 \\gexec" } ]);

# random_disturbance(): one of them.
sub random_disturbance
{
	my ($what, $statements) = @{ any(@disturbances) };

	return ($what, $statements->());
}

1;
