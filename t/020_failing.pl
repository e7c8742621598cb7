# What becomes of counts when a handler fails: the keys that fail keep their
# counts and are told of, all others are stored, and everything is stored
# once.  In each way in which a handler can refuse a key; when it is broken or
# missing; and with restart 'temporary', where what fails is discarded.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use HandlerTest;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $db = 'postgres';
my $node = new_handler_node();

# --- one key of a batch fails -----------------------------------------------

# The forms of a handler and the ways in which it can refuse a key.
my %refusing = (
	array_error => {
		error => qr/key is poisoned/,
		handler => q{
CREATE OR REPLACE FUNCTION array_error_handler(keys int[], counts bigint[])
RETURNS void LANGUAGE plpgsql AS $$
BEGIN
	PERFORM store('array_error', keys, counts);
	IF is_poisoned('array_error', keys) THEN
		RAISE EXCEPTION 'key is poisoned';
	END IF;
END $$}
	},
	array_false => {
		error => qr/returned false/,
		handler => q{
CREATE OR REPLACE FUNCTION array_false_handler(keys int[], counts bigint[])
RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
	PERFORM store('array_false', keys, counts);
	RETURN NOT is_poisoned('array_false', keys);
END $$}
	},
	single_error => {
		error => qr/key is poisoned/,
		handler => q{
CREATE OR REPLACE FUNCTION single_error_handler(key int, count bigint)
RETURNS void LANGUAGE plpgsql AS $$
BEGIN
	PERFORM store('single_error', ARRAY[key], ARRAY[count]);
	IF is_poisoned('single_error', ARRAY[key]) THEN
		RAISE EXCEPTION 'key is poisoned';
	END IF;
END $$}
	},
	single_null => {
		error => qr/returned null/,
		handler => q{
CREATE OR REPLACE FUNCTION single_null_handler(key int, count bigint)
RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
	PERFORM store('single_null', ARRAY[key], ARRAY[count]);
	RETURN CASE WHEN is_poisoned('single_null', ARRAY[key]) THEN NULL ELSE true END;
END $$}
	},

	# These do not fail themselves; the trigger below does when they commit.
	array_commit => {
		error => qr/refused at commit/,
		handler => q{
CREATE OR REPLACE FUNCTION array_commit_handler(keys int[], counts bigint[])
RETURNS void LANGUAGE sql AS $$ SELECT store('array_commit', keys, counts) $$}
	},
	single_commit => {
		error => qr/refused at commit/,
		handler => q{
CREATE OR REPLACE FUNCTION single_commit_handler(key int, count bigint)
RETURNS void LANGUAGE sql AS
$$ SELECT store('single_commit', ARRAY[key], ARRAY[count]) $$}
	});

sql(q{
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
	IF NEW.buffer LIKE '%commit' AND is_poisoned(NEW.buffer, ARRAY[NEW.k]) THEN
		RAISE EXCEPTION 'refused at commit';
	END IF;
	RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER refuse AFTER INSERT OR UPDATE ON stored
DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse();
});

foreach my $name (sort keys %refusing)
{
	my $error = $refusing{$name}{error};

	# A thousand keys in one transaction and one batch, two of them bad.  A
	# failed key's next attempt is an hour away.
	sql($refusing{$name}{handler});
	sql(qq{
INSERT INTO poison VALUES ('$name', 500), ('$name', 1000);
CREATE FOREIGN TABLE $name (k int NOT NULL, n bigint NOT NULL)
SERVER statbuffer
OPTIONS (handler '${name}_handler', interval '1h', backoff '1h', batch_size '1000')});
	sql("INSERT INTO $name SELECT k, k FROM generate_series(1, 1000) AS k");
	sql("SELECT sb_flush_all('$name')");

	wait_for($node, $db, "SELECT count(*) FROM $name",
		"$name: all but the keys that fail are stored", '2');
	wait_for($node, $db, "SELECT count(*) FROM sb_keys('$name') WHERE failures > 0",
		"$name: the failing keys ended up alone", '2');
	is(sql("SELECT count(*), sum(n), sum(calls) FROM stored WHERE buffer = '$name'"),
		'998|' . (1000 * 1001 / 2 - 1500) . '|998',
		"$name: each of the others was stored once, with its count");
	is(sql("SELECT key, count, in_flight, failures,
			 due_at BETWEEN now() + '50min' AND now() + '1h'
			 FROM sb_keys('$name') WHERE count + in_flight <> 0 ORDER BY count"),
		"500|500|0|1|t\n1000|1000|0|1|t",
		"$name: the failing keys keep their counts and back off");
	like(
		sql("SELECT last_error FROM sb_keys('$name') WHERE key = '500'"),
		$error, "$name: the key's error can be looked up");
	is(sql("SELECT count(*) FROM sb_keys('$name')
			 WHERE key NOT IN ('500', '1000') AND (failures > 0 OR last_error IS NOT NULL)"),
		'0',
		"$name: no other key is blamed");
	like(
		sql("SELECT state || ' ' || last_error FROM sb_stat_buffers
			 WHERE relid = '$name'::regclass"),
		qr/^failing .*$error/,
		"$name: the view tells that the buffer fails");
	is(sql("SELECT failures, flushed_keys, flushed_count, discarded, pending, in_flight
			 FROM sb_stat_buffers WHERE relid = '$name'::regclass"),
		'2|998|499000|0|1500|0',
		"$name: the statistics agree");

	# What is counted after that for the keys that work is stored, and what
	# is counted for those that do not is kept with the rest.
	sql("SELECT sb_increment(k, 7, '$name') FROM generate_series(499, 501) AS k");
	sql("SELECT sb_flush(499, '$name'), sb_flush(501, '$name')");
	wait_for($node, $db,
	"SELECT sum(n) FROM stored WHERE buffer = '$name' AND k IN (499, 501)",
		"$name: other keys go on", '1014');
	is(sql("SELECT sb_count(500, '$name')"),
		'507', "$name: the failing key goes on counting");

	# With a shorter back-off they are tried again and again...
	sql("ALTER FOREIGN TABLE $name OPTIONS (SET backoff '50ms')");
	sql("SELECT sb_flush_all('$name')");
	wait_for($node, $db,
	"SELECT count(*) FROM sb_keys('$name') WHERE failures > 2",
		"$name: attempts are made and counted", '2');

	# ... until it works: one attempt finds that, without being asked to.
	sql("DELETE FROM poison WHERE buffer = '$name'");
	wait_for($node, $db, "SELECT count(*) FROM $name",
		"$name: once it works the keys are stored by themselves", '0');
	is(sql("SELECT count(*), sum(n), max(calls) FROM stored WHERE buffer = '$name'"),
		'1000|' . (1000 * 1001 / 2 + 21) . '|2',
		"$name: everything is stored exactly once");
	wait_for($node, $db,
	"SELECT state IN ('running', 'idle') AND pending = 0
		 FROM sb_stat_buffers WHERE relid = '$name'::regclass",
		"$name: the buffer does not fail any more");
	is(sql("SELECT count(*) FROM sb_keys('$name')
			 WHERE failures > 0 OR last_error IS NOT NULL"),
		'0',
		"$name: no key has an error any more");
	note(
		"$name: "
		  . sql(
			"SELECT handler_calls || ' calls, ' || failures || ' failures'
			 FROM sb_stat_buffers WHERE relid = '$name'::regclass"));
	sql("DROP FOREIGN TABLE $name");
}

# --- a handler is repaired; one is dropped and comes back -------------------

sql(q{
CREATE FUNCTION broken_handler(k int, n bigint) RETURNS void
LANGUAGE plpgsql AS $$ BEGIN PERFORM 1 / (n - n); END $$;
CREATE FOREIGN TABLE broken (k int NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'broken_handler', interval '50ms', backoff '100ms');
SELECT sb_increment(k, 3, 'broken') FROM generate_series(1, 10) AS k;
});
wait_for($node, $db,
	"SELECT count(*) FROM sb_keys('broken')
	 WHERE failures > 1 AND last_error LIKE '%division by zero%'",
	'every key fails with the handler that is broken',
	'10');
sql(q{
CREATE OR REPLACE FUNCTION broken_handler(k int, n bigint) RETURNS void
LANGUAGE sql AS $$ SELECT store('broken', ARRAY[k], ARRAY[n]) $$});
wait_for($node, $db, "SELECT count(*) FROM broken",
	'with the handler replaced they are stored by themselves', '0');
is(sum_stored('broken'), '30', 'all of them, once');

sql(q{
DROP FUNCTION broken_handler(int, bigint);
SELECT sb_increment(k, 5, 'broken') FROM generate_series(1, 10) AS k;
});
wait_for($node, $db,
	"SELECT state = 'failing' AND last_error LIKE '%broken_handler%does not exist%'
	 FROM sb_stat_buffers WHERE buffer = 'broken'",
	'the view tells that the handler is gone');
is(sql("SELECT count(*), sum(n) FROM broken"),
	'10|50', 'the counts are kept meanwhile');
like(error_of("SELECT sb_start('broken')"),
	qr/broken_handler.*does not exist.*HINT/s,
	'and so does sb_start, with a hint');
sql(q{
CREATE FUNCTION broken_handler(k int[], n bigint[]) RETURNS void
LANGUAGE sql AS $$ SELECT store('broken', k, n) $$});
wait_for($node, $db, "SELECT count(*) FROM broken",
	'with a new handler, be it of the other form, they are stored', '0');
is(sum_stored('broken'), '80', 'all of them, once');
wait_for($node, $db,
	"SELECT state IN ('running', 'idle') FROM sb_stat_buffers WHERE buffer = 'broken'",
	'the buffer works again');
sql("DROP FOREIGN TABLE broken");

# --- restart 'temporary': one attempt ---------------------------------------

sql(q{
CREATE FUNCTION once_handler(k int[], n bigint[]) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
	PERFORM store('once', k, n);
	IF is_poisoned('once', k) THEN
		RAISE EXCEPTION 'key is poisoned';
	END IF;
END $$;
CREATE FOREIGN TABLE once (k int NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'once_handler', interval '50ms', restart 'temporary');
INSERT INTO poison VALUES ('once', 3), ('once', 77);
});
my $log_start = -s $node->logfile;
sql("INSERT INTO once SELECT k, k FROM generate_series(1, 100) AS k");
wait_for($node, $db, "SELECT count(*) FROM once",
	'with restart "temporary" nothing is kept', '0');
is(sql("SELECT count(*), sum(n), max(calls) FROM stored WHERE buffer = 'once'"),
	'98|4970|1',
	'only the keys that fail are discarded');
wait_for($node, $db,
	"SELECT discarded, flushed_count, pending, in_flight
	 FROM sb_stat_buffers WHERE buffer = 'once'",
	'what was discarded is added up in the view',
	'80|4970|0|0');
like(slurp_file($node->logfile, $log_start),
	qr/discarded.*once/i, 'and told in the log');
sql("DELETE FROM poison WHERE buffer = 'once'");
sql("SELECT sb_increment(3, 6, 'once')");
wait_for($node, $db, "SELECT n FROM stored WHERE buffer = 'once' AND k = 3",
	'a key that was discarded starts afresh', '6');
sql("DROP FOREIGN TABLE once");

$node->stop('fast');
has_not_crashed($node, 'the server never crashed');

done_testing();
