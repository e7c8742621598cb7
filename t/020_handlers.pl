
# Copyright (c) 2026, statbuffer developers

# What becomes of counts when handlers fail, wait, time out, collide with
# other transactions, change or go away: the keys that fail keep their counts
# and are told of, all others are stored, and everything is stored once.

use strict;
use warnings;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use IPC::Run;
use Test::More;

my $node = PostgreSQL::Test::Cluster->new('main');
$node->init;
$node->append_conf(
	'postgresql.conf', q{
max_worker_processes = 32
statbuffer.max_workers = 16
statbuffer.max_memory = 64MB
log_line_prefix = '%m [%p] %b %q%a '
});
$node->start;

sub sql { return $node->safe_psql('postgres', $_[0]); }

# Waits until a query says so; when it doesn't, tells what there is instead.
sub wait_until
{
	my ($query, $what, $expected) = @_;

	my $ok = $node->poll_query_until('postgres', $query, $expected);
	ok($ok, $what);
	diag(($node->psql('postgres', 'TABLE sb_stat_buffers'))[1]) if !$ok;
	return $ok;
}

# Runs a statement that must fail, and returns what it says.
sub error_of
{
	my ($statement) = @_;
	my ($status, $out, $err) = $node->psql('postgres', $statement);

	isnt($status, 0, "refused: $statement");
	return $err;
}

# A session in the background that runs statements, one after the other.
sub session
{
	my (@statements) = @_;
	my $session = { out => '', err => '' };

	$session->{run} = IPC::Run::start(
		[
			$node->installed_command('psql'), '-XAtq',
			'-v', 'ON_ERROR_STOP=1',
			'-d', $node->connstr('postgres'),
			map { ('-c', $_) } @statements
		],
		'<' => \undef,
		'>' => \$session->{out},
		'2>' => \$session->{err});
	return $session;
}

sub finish
{
	my ($session, $what) = @_;
	my $ok = $session->{run}->finish;

	ok($ok, $what);
	diag($session->{err}) if !$ok;
	return $session->{out};
}

# A gate is an advisory lock: what stands before it waits until it is opened.
# A session holds it shut until it is ended.
my $gates = 0;

sub shut_gate
{
	my $gate = { number => ++$gates };
	my $name = "gate $gate->{number}";

	$gate->{session} = session(
		"SET application_name = '$name'",
		"SELECT pg_advisory_lock($gate->{number})",
		'SELECT pg_sleep(3600)');
	$node->poll_query_until(
		'postgres', qq{
SELECT EXISTS (SELECT FROM pg_locks
 WHERE locktype = 'advisory' AND objid = $gate->{number} AND granted)})
	  or die "$name was not shut";
	return $gate;
}

sub open_gate
{
	my ($gate) = @_;

	sql(
		"SELECT pg_terminate_backend(pid) FROM pg_stat_activity
		 WHERE application_name = 'gate $gate->{number}'");
	$gate->{session}{run}->finish;
	return;
}

# Somebody stands before the gate.
sub wait_at_gate
{
	my ($gate, $what) = @_;

	return wait_until(
		qq{
SELECT EXISTS (SELECT FROM pg_locks
 WHERE locktype = 'advisory' AND objid = $gate->{number} AND NOT granted)},
		$what);
}

# What a buffer's keys have in the table that the handlers store into.
sub stored
{
	my ($buffer) = @_;

	return sql("SELECT coalesce(sum(n), 0) FROM stored WHERE buffer = '$buffer'");
}

sql(
	q{
CREATE EXTENSION statbuffer;

CREATE TABLE stored (
	buffer text, k int, n bigint NOT NULL, calls int NOT NULL DEFAULT 1,
	PRIMARY KEY (buffer, k));

-- keys that handlers refuse
CREATE TABLE poison (buffer text, k int, PRIMARY KEY (buffer, k));

CREATE FUNCTION is_poisoned(b text, keys int[]) RETURNS boolean LANGUAGE sql
AS 'SELECT EXISTS (SELECT FROM poison WHERE buffer = b AND k = ANY (keys))';

CREATE FUNCTION store(b text, keys int[], counts bigint[]) RETURNS void
LANGUAGE sql AS $$
	INSERT INTO stored AS s (buffer, k, n)
	SELECT b, k, n FROM unnest(keys, counts) AS u (k, n)
	ON CONFLICT (buffer, k) DO UPDATE
	SET n = s.n + EXCLUDED.n, calls = s.calls + 1
$$;
});

#
# One key of a batch fails
#

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

sql(
	q{
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
	sql(
		qq{
INSERT INTO poison VALUES ('$name', 500), ('$name', 1000);
CREATE FOREIGN TABLE $name (k int NOT NULL, n bigint NOT NULL)
SERVER statbuffer
OPTIONS (handler '${name}_handler', interval '1h', backoff '1h', batch_size '1000')});
	sql("INSERT INTO $name SELECT k, k FROM generate_series(1, 1000) AS k");
	sql("SELECT sb_flush_all('$name')");

	wait_until("SELECT count(*) FROM $name",
		"$name: all but the keys that fail are stored", '2');
	wait_until("SELECT count(*) FROM sb_keys('$name') WHERE failures > 0",
		"$name: the failing keys ended up alone", '2');
	is( sql(
			"SELECT count(*), sum(n), sum(calls) FROM stored WHERE buffer = '$name'"
		),
		'998|' . (1000 * 1001 / 2 - 1500) . '|998',
		"$name: each of the others was stored once, with its count");
	is( sql(
			"SELECT key, count, in_flight, failures,
			 due_at BETWEEN now() + '50min' AND now() + '1h'
			 FROM sb_keys('$name') WHERE count + in_flight <> 0 ORDER BY count"
		),
		"500|500|0|1|t\n1000|1000|0|1|t",
		"$name: the failing keys keep their counts and back off");
	like(
		sql("SELECT last_error FROM sb_keys('$name') WHERE key = '500'"),
		$error, "$name: the key's error can be looked up");
	is( sql(
			"SELECT count(*) FROM sb_keys('$name')
			 WHERE key NOT IN ('500', '1000') AND (failures > 0 OR last_error IS NOT NULL)"
		),
		'0',
		"$name: no other key is blamed");
	like(
		sql(
			"SELECT state || ' ' || last_error FROM sb_stat_buffers
			 WHERE buffer = '$name'::regclass"),
		qr/^failing .*$error/,
		"$name: the view tells that the buffer fails");
	is( sql(
			"SELECT failures, flushed_keys, flushed_count, discarded, pending, in_flight
			 FROM sb_stat_buffers WHERE buffer = '$name'::regclass"),
		'2|998|499000|0|1500|0',
		"$name: the statistics agree");

	# What is counted after that for the keys that work is stored, and what
	# is counted for those that don't is kept with the rest.
	sql("SELECT sb_increment(k, 7, '$name') FROM generate_series(499, 501) AS k");
	sql("SELECT sb_flush(499, '$name'), sb_flush(501, '$name')");
	wait_until(
		"SELECT sum(n) FROM stored WHERE buffer = '$name' AND k IN (499, 501)",
		"$name: other keys go on", '1014');
	is(sql("SELECT sb_count(500, '$name')"),
		'507', "$name: the failing key goes on counting");

	# With a shorter back-off they are tried again and again...
	sql("ALTER FOREIGN TABLE $name OPTIONS (SET backoff '50ms')");
	sql("SELECT sb_flush_all('$name')");
	wait_until(
		"SELECT count(*) FROM sb_keys('$name') WHERE failures > 2",
		"$name: attempts are made and counted", '2');

	# ... until it works: one attempt finds that, without being asked to.
	sql("DELETE FROM poison WHERE buffer = '$name'");
	wait_until("SELECT count(*) FROM $name",
		"$name: once it works the keys are stored by themselves", '0');
	is( sql(
			"SELECT count(*), sum(n), max(calls) FROM stored WHERE buffer = '$name'"
		),
		'1000|' . (1000 * 1001 / 2 + 21) . '|2',
		"$name: everything is stored exactly once");
	wait_until(
		"SELECT state IN ('running', 'idle') AND pending = 0
		 FROM sb_stat_buffers WHERE buffer = '$name'::regclass",
		"$name: the buffer does not fail any more");
	is( sql(
			"SELECT count(*) FROM sb_keys('$name')
			 WHERE failures > 0 OR last_error IS NOT NULL"),
		'0',
		"$name: no key has an error any more");
	note(
		"$name: "
		  . sql(
			"SELECT handler_calls || ' calls, ' || failures || ' failures'
			 FROM sb_stat_buffers WHERE buffer = '$name'::regclass"));
	sql("DROP FOREIGN TABLE $name");
}

#
# A handler is repaired; one is dropped and comes back
#

sql(
	q{
CREATE FUNCTION broken_handler(k int, n bigint) RETURNS void
LANGUAGE plpgsql AS $$ BEGIN PERFORM 1 / (n - n); END $$;
CREATE FOREIGN TABLE broken (k int NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'broken_handler', interval '50ms', backoff '100ms');
SELECT sb_increment(k, 3, 'broken') FROM generate_series(1, 10) AS k;
});
wait_until(
	"SELECT count(*) FROM sb_keys('broken')
	 WHERE failures > 1 AND last_error LIKE '%division by zero%'",
	'every key fails with the handler that is broken',
	'10');
sql(
	q{
CREATE OR REPLACE FUNCTION broken_handler(k int, n bigint) RETURNS void
LANGUAGE sql AS $$ SELECT store('broken', ARRAY[k], ARRAY[n]) $$});
wait_until("SELECT count(*) FROM broken",
	'with the handler replaced they are stored by themselves', '0');
is(stored('broken'), '30', 'all of them, once');

sql(
	q{
DROP FUNCTION broken_handler(int, bigint);
SELECT sb_increment(k, 5, 'broken') FROM generate_series(1, 10) AS k;
});
wait_until(
	"SELECT state = 'failing' AND last_error LIKE '%broken_handler%does not exist%'
	 FROM sb_stat_buffers WHERE buffer = 'broken'::regclass",
	'the view tells that the handler is gone');
is(sql("SELECT count(*), sum(n) FROM broken"),
	'10|50', 'the counts are kept meanwhile');
like(error_of("SELECT sb_start('broken')"),
	qr/broken_handler.*does not exist.*HINT/s,
	'and so does sb_start, with a hint');
sql(
	q{
CREATE FUNCTION broken_handler(k int[], n bigint[]) RETURNS void
LANGUAGE sql AS $$ SELECT store('broken', k, n) $$});
wait_until("SELECT count(*) FROM broken",
	'with a new handler, be it of the other form, they are stored', '0');
is(stored('broken'), '80', 'all of them, once');
wait_until(
	"SELECT state IN ('running', 'idle') FROM sb_stat_buffers WHERE buffer = 'broken'::regclass",
	'the buffer works again');
sql("DROP FOREIGN TABLE broken");

#
# A handler takes its time
#

sql(
	q{
CREATE TABLE waits_at (gate int);
CREATE FUNCTION slow_handler(k int[], n bigint[]) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
	PERFORM store('slow', k, n);
	PERFORM pg_advisory_xact_lock_shared(gate) FROM waits_at;
END $$;
CREATE FOREIGN TABLE slow (k int NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'slow_handler', interval '50ms');
});
my $gate = shut_gate();
sql("INSERT INTO waits_at VALUES ($gate->{number})");
sql("SELECT sb_increment(1, 100, 'slow')");
wait_at_gate($gate, 'the handler is at work');
is(sql("SELECT key, count, in_flight FROM sb_keys('slow')"),
	'1|0|100', 'the count is in flight');

# Each of these is a transaction of its own and must not wait.
sql("SET statement_timeout = '60s';\n"
	  . "SELECT sb_increment(1, 1, 'slow');\n" x 200
	  . "SELECT sb_async_increment(2, 1, 'slow');\n" x 100
	  . "INSERT INTO slow SELECT 3, 1 FROM generate_series(1, 10);\n" x 10);
pass('increments do not wait for the handler');
is( sql("SELECT sb_count(1, 'slow'), sb_count(2, 'slow'), sb_count(3, 'slow')"
	),
	'300|100|100',
	'what is in flight counts as counted');
is( sql("SELECT key, count, in_flight FROM sb_keys('slow') ORDER BY key"),
	"1|200|100\n2|100|0\n3|100|0",
	'and the same flush still goes on');
like(sql("SELECT sb_drain('slow', '100ms')"),
	qr/^f$/, 'a drain that runs out of time says so');
sql('DELETE FROM waits_at');
open_gate($gate);
is(sql("SELECT sb_drain('slow', '180s')"), 't', 'the gate is open: drained');
is( sql("SELECT k, n FROM stored WHERE buffer = 'slow' ORDER BY k"),
	"1|300\n2|100\n3|100",
	'all arrived, once');
sql("DROP FOREIGN TABLE slow");

# One that takes too long is cut off.
sql(
	q{
CREATE FUNCTION endless_handler(k int, n bigint) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
	PERFORM store('endless', ARRAY[k], ARRAY[n]);
	IF is_poisoned('endless', ARRAY[k]) THEN
		PERFORM pg_sleep(3600);
	END IF;
END $$;
CREATE FOREIGN TABLE endless (k int NOT NULL, n bigint NOT NULL)
SERVER statbuffer
OPTIONS (handler 'endless_handler', interval '50ms', backoff '100ms', handler_timeout '200ms');
INSERT INTO poison VALUES ('endless', 5);
INSERT INTO endless SELECT k, 10 FROM generate_series(1, 10) AS k;
});
wait_until(
	"SELECT failures > 1 AND last_error LIKE '%200 ms%' FROM sb_keys('endless') WHERE key = '5'",
	'a handler that takes longer than handler_timeout has failed');
is( sql("SELECT count(*), sum(n) FROM stored WHERE buffer = 'endless'"),
	'9|90', 'the other keys of its batch are stored');
is(sql("SELECT sb_count(5, 'endless')"), '10', 'the key keeps its count');
sql("DELETE FROM poison WHERE buffer = 'endless'");
wait_until("SELECT count(*) FROM endless", 'it is stored once it can be',
	'0');
is( sql("SELECT sum(n), max(calls) FROM stored WHERE buffer = 'endless'"),
	'100|1', 'everything exactly once');
sql("DROP FOREIGN TABLE endless");

#
# Handlers collide with other transactions
#

# The worker is always the one that finds a deadlock, and so its victim: it
# looks after 10 ms, and the application after an hour.
sql(
	q{
CREATE ROLE keeper LOGIN;
GRANT USAGE ON FOREIGN SERVER statbuffer TO keeper;
GRANT ALL ON stored, poison, waits_at TO keeper;
CREATE SCHEMA keeper AUTHORIZATION keeper;
GRANT SET ON PARAMETER deadlock_timeout TO keeper;
ALTER ROLE keeper SET deadlock_timeout = '10ms';

CREATE TABLE accounts (id int PRIMARY KEY, n bigint NOT NULL);
INSERT INTO accounts VALUES (1, 0), (2, 0);
CREATE SEQUENCE attempts;
GRANT ALL ON accounts, attempts TO keeper;

CREATE FUNCTION transfer_handler(k int, n bigint) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
	PERFORM nextval('attempts');
	UPDATE accounts a SET n = a.n + transfer_handler.n WHERE id = 1;
	PERFORM pg_advisory_xact_lock_shared(gate) FROM waits_at;
	UPDATE accounts a SET n = a.n + transfer_handler.n WHERE id = 2;
END $$;
CREATE FOREIGN TABLE transfers (k int NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'transfer_handler', interval '50ms', backoff '1h');
ALTER FOREIGN TABLE transfers OWNER TO keeper;
});
$gate = shut_gate();
sql("INSERT INTO waits_at VALUES ($gate->{number})");
sql("SELECT sb_increment(1, 10, 'transfers')");
wait_at_gate($gate, 'the handler has locked the first account');
my $application = session(
	"SET application_name = 'application'",
	"SET deadlock_timeout = '1h'",
	'BEGIN',
	'UPDATE accounts SET n = n + 1 WHERE id = 2',
	'UPDATE accounts SET n = n + 1 WHERE id = 1',
	'COMMIT');
wait_until(
	"SELECT EXISTS (SELECT FROM pg_stat_activity
	 WHERE application_name = 'application' AND wait_event_type = 'Lock')",
	'the application has locked the second and waits for the first');
open_gate($gate);
finish($application, 'the application wins the deadlock');
wait_until("SELECT count(*) FROM transfers",
	'the flush is tried again without a back-off', '0');
sql("DELETE FROM waits_at");
is(sql("SELECT id, n FROM accounts ORDER BY id"),
	"1|11\n2|11", 'both are stored exactly once');
cmp_ok(sql("SELECT last_value FROM attempts"),
	'>', 1, 'it did take more than one attempt');
is( sql(
		"SELECT failures, state IN ('running', 'idle') FROM sb_stat_buffers
		 WHERE buffer = 'transfers'::regclass"),
	'0|t',
	'a deadlock is not a failure');
is(sql("SELECT count(*) FROM sb_keys('transfers') WHERE failures > 0 OR last_error IS NOT NULL"),
	'0', 'nor is the key to blame');

# The same with an owner whose transactions are serializable, one of which
# has read what another transaction then changes.
sql(
	q{
DROP FOREIGN TABLE transfers;
UPDATE accounts SET n = 0;
SELECT setval('attempts', 1, false);
ALTER ROLE keeper SET default_transaction_isolation = 'serializable';
CREATE TABLE isolation_seen (level text);
GRANT ALL ON isolation_seen TO keeper;
CREATE FUNCTION total_handler(k int, n bigint) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
	PERFORM nextval('attempts');
	INSERT INTO isolation_seen VALUES (current_setting('transaction_isolation'));
	PERFORM FROM accounts;
	PERFORM pg_advisory_xact_lock_shared(gate) FROM waits_at;
	UPDATE accounts a SET n = a.n + total_handler.n WHERE id = 1;
END $$;
CREATE FOREIGN TABLE totals (k int NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'total_handler', interval '50ms', backoff '1h');
ALTER FOREIGN TABLE totals OWNER TO keeper;
});
$gate = shut_gate();
sql("INSERT INTO waits_at VALUES ($gate->{number})");
sql("SELECT sb_increment(1, 10, 'totals')");
wait_at_gate($gate, 'the handler has read the account');
sql("UPDATE accounts SET n = n + 1 WHERE id = 1");
open_gate($gate);
wait_until(
	"SELECT count(*) FROM totals",
	'the flush is tried again after a serialization failure, without a back-off',
	'0');
sql("DELETE FROM waits_at");
is(sql("SELECT n FROM accounts WHERE id = 1"),
	'11', 'both are stored exactly once');
cmp_ok(sql("SELECT last_value FROM attempts"),
	'>', 1, 'it did take more than one attempt');
is(sql("SELECT DISTINCT level FROM isolation_seen"),
	'serializable', "the transaction is of the owner's kind");
is( sql(
		"SELECT failures, state IN ('running', 'idle') FROM sb_stat_buffers
		 WHERE buffer = 'totals'::regclass"),
	'0|t',
	'a serialization failure is not a failure');
sql("DROP FOREIGN TABLE totals");

#
# Whose handler, and as whom it runs
#

# The handler is found on the owner's own search path, and the owner's
# settings are in force inside.
sql(
	q{
ALTER ROLE keeper RESET ALL;
ALTER ROLE keeper SET search_path = keeper, public;
ALTER ROLE keeper SET work_mem = '7MB';
ALTER ROLE keeper IN DATABASE postgres SET lock_timeout = '77s';
CREATE TABLE surroundings (
	buffer text, session_role text, running_role text, path text, memory text, lock_timeout text);
GRANT ALL ON surroundings TO PUBLIC;

CREATE FUNCTION public.look_handler(k int, n bigint) RETURNS void
LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'this is the wrong one'; END $$;
CREATE FUNCTION keeper.look_handler(k int, n bigint) RETURNS void
LANGUAGE sql AS $$
	INSERT INTO surroundings SELECT 'looks', session_user, current_user,
		current_setting('search_path'), current_setting('work_mem'),
		current_setting('lock_timeout')
$$;
CREATE FOREIGN TABLE looks (k int NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'look_handler', interval '50ms');
ALTER FOREIGN TABLE looks OWNER TO keeper;
SELECT sb_increment(1, 1, 'looks');
});
wait_until("SELECT count(*) FROM looks",
	"the handler on the owner's search path is called", '0');
is( sql("SELECT * FROM surroundings"),
	'looks|keeper|keeper|keeper, public|7MB|77s',
	"it runs as the owner, in the owner's environment");

# Counts that are held when the buffer changes hands are stored as the new
# owner, though there is a worker that runs as the old one.
sql(
	q{
CREATE ROLE heir LOGIN;
ALTER FOREIGN TABLE looks OPTIONS (SET interval '1h');
SELECT sb_increment(2, 5, 'looks');
ALTER FOREIGN TABLE looks OPTIONS (SET handler 'keeper.look_handler');
GRANT USAGE ON SCHEMA keeper TO heir;
TRUNCATE surroundings;
ALTER FOREIGN TABLE looks OWNER TO heir;
SELECT sb_flush_all('looks');
});
wait_until("SELECT count(*) FROM looks",
	'after a change of owner the flush goes on', '0');
is( sql("SELECT session_role, running_role FROM surroundings"),
	'heir|heir', 'as the new owner');
sql("DROP FOREIGN TABLE looks");

# A role that cannot log in can own a buffer, but no worker can be it.
SKIP:
{
	skip 'owners need no LOGIN in this version', 6
	  if $node->pg_version >= 17;

	sql(
		q{
CREATE ROLE locked_out NOLOGIN;
CREATE FUNCTION guest_handler(k int, n bigint) RETURNS void
LANGUAGE sql AS $$ SELECT store('guest', ARRAY[k], ARRAY[n]) $$;
GRANT ALL ON stored, poison TO locked_out;
CREATE FOREIGN TABLE guest (k int NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'guest_handler', interval '50ms', backoff '100ms');
ALTER FOREIGN TABLE guest OWNER TO locked_out;
});
	like(
		error_of("SELECT sb_start('guest')"),
		qr/locked_out.*HINT.*LOGIN/s,
		'sb_start refuses an owner without LOGIN, with a hint');
	sql("SELECT sb_increment(1, 4, 'guest')");
	wait_until(
		"SELECT state = 'failing' AND last_error LIKE '%LOGIN%'
		 FROM sb_stat_buffers WHERE buffer = 'guest'::regclass",
		'increments are kept, and the view tells why they wait');
	is(sql("SELECT sb_count(1, 'guest')"), '4', 'nothing is lost');
	sql("ALTER ROLE locked_out LOGIN");
	wait_until("SELECT count(*) FROM guest",
		'once the role may log in they are stored by themselves', '0');
	is(stored('guest'), '4', 'exactly');
	wait_until(
		"SELECT state <> 'failing' FROM sb_stat_buffers WHERE buffer = 'guest'::regclass",
		'the buffer does not fail any more');
	sql("DROP FOREIGN TABLE guest");
}

# A function that a stranger put in the owner's way does not get to run.
sql(
	q{
CREATE ROLE stranger LOGIN;
CREATE TABLE loot (who text);
GRANT ALL ON loot TO PUBLIC;
CREATE FUNCTION keeper.lured_handler(k int, n bigint) RETURNS void
LANGUAGE sql AS $$ INSERT INTO loot VALUES (current_user) $$;
ALTER ROLE keeper SET search_path = keeper, public;
CREATE FOREIGN TABLE lured (k int NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'keeper.lured_handler', interval '50ms', backoff '100ms');
ALTER FOREIGN TABLE lured OWNER TO keeper;
GRANT CREATE, USAGE ON SCHEMA keeper TO stranger;
ALTER FUNCTION keeper.lured_handler(int, bigint) OWNER TO stranger;
});
like(error_of("SELECT sb_start('lured')"),
	qr/does not belong to the buffer's owner.*HINT/s,
	"sb_start refuses a stranger's handler");
sql("SELECT sb_increment(1, 4, 'lured')");
wait_until(
	"SELECT state = 'failing' AND last_error LIKE '%does not belong%'
	 FROM sb_stat_buffers WHERE buffer = 'lured'::regclass",
	'so does the worker, and the view tells it');
is( sql("SELECT sb_count(1, 'lured'), (SELECT count(*) FROM loot)"),
	'4|0', "the stranger's function did not run, and the count is kept");
sql("GRANT stranger TO keeper");
wait_until(
	"SELECT count(*) FROM lured",
	'of a role that the owner is a member of it is no stranger\'s', '0');
is(sql("SELECT who FROM loot"), 'keeper', 'and runs as the owner');
sql("DROP FOREIGN TABLE lured");

#
# A handler counts
#

sql(
	q{
CREATE FUNCTION rollup_handler(k int[], n bigint[]) RETURNS void
LANGUAGE sql AS $$ SELECT store('rollup', k, n) $$;
CREATE FOREIGN TABLE rollup (k int NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'rollup_handler', interval '50ms');

-- counts each key's tens in another buffer, and its opposite in its own; and
-- fails now and then, when both must be undone
CREATE FUNCTION detail_handler(key int, n bigint) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
	PERFORM store('detail', ARRAY[key], ARRAY[n]);
	PERFORM sb_increment(abs(key) / 10, n, 'rollup');
	IF key > 0 THEN
		PERFORM sb_increment(- key, n, 'detail');
	END IF;
	IF is_poisoned('detail', ARRAY[key]) THEN
		RAISE EXCEPTION 'key is poisoned';
	END IF;
END $$;
CREATE FOREIGN TABLE detail (k int NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'detail_handler', interval '50ms', backoff '50ms');
INSERT INTO poison VALUES ('detail', 13), ('detail', -17);
INSERT INTO detail SELECT k, k FROM generate_series(1, 99) AS k;
});
wait_until("SELECT key FROM sb_keys('detail') WHERE failures > 2 ORDER BY key",
	'a handler that counts fails for two keys', "-17\n13");
sql("DELETE FROM poison WHERE buffer = 'detail'");
wait_until("SELECT count(*) FROM sb_keys('detail') WHERE count + in_flight <> 0",
	'a handler that counts in its own buffer comes to an end', '0');
is(sql("SELECT sb_drain('rollup', '180s')"), 't', 'so does the other buffer');
is( sql(
		"SELECT sign(k), count(*), sum(n), max(calls) FROM stored
		 WHERE buffer = 'detail' GROUP BY 1 ORDER BY 1"),
	"-1|99|4950|1\n1|99|4950|1",
	'what it counts in its own buffer is stored once');
is( sql(
		"SELECT count(*), sum(n) FROM stored s
		 WHERE buffer = 'rollup'
		 AND n = (SELECT 2 * sum(g) FROM generate_series(1, 99) AS g WHERE g / 10 = s.k)"
	),
	'10|9900',
	'and so is what it counts in another');
sql("DROP FOREIGN TABLE detail, rollup");

#
# restart 'temporary': one attempt
#

sql(
	q{
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
wait_until("SELECT count(*) FROM once",
	'with restart "temporary" nothing is kept', '0');
is( sql("SELECT count(*), sum(n), max(calls) FROM stored WHERE buffer = 'once'"
	),
	'98|4970|1',
	'only the keys that fail are discarded');
wait_until(
	"SELECT discarded, flushed_count, pending, in_flight
	 FROM sb_stat_buffers WHERE buffer = 'once'::regclass",
	'what was discarded is added up in the view',
	'80|4970|0|0');
like(slurp_file($node->logfile, $log_start),
	qr/discarded.*once/i, 'and told in the log');
sql("DELETE FROM poison WHERE buffer = 'once'");
sql("SELECT sb_increment(3, 6, 'once')");
wait_until("SELECT n FROM stored WHERE buffer = 'once' AND k = 3",
	'a key that was discarded starts afresh', '6');
sql("DROP FOREIGN TABLE once");

#
# Key columns change under counts
#

# What was counted before is kept but not handed over as something else; what
# is counted then is stored as it should be.
sql(
	q{
CREATE TABLE stored_names (k text PRIMARY KEY, n bigint);
CREATE FUNCTION shaped_handler(k int, n bigint) RETURNS void
LANGUAGE sql AS $$ SELECT store('shaped', ARRAY[k], ARRAY[n]) $$;
CREATE FUNCTION shaped_handler(k text, n bigint) RETURNS void
LANGUAGE sql AS $$
	INSERT INTO stored_names AS s VALUES (k, n)
	ON CONFLICT (k) DO UPDATE SET n = s.n + EXCLUDED.n
$$;
CREATE FOREIGN TABLE shaped (k int NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'shaped_handler', interval '1h', backoff '100ms');
SELECT sb_increment(k, 2, 'shaped') FROM generate_series(1, 50) AS k;
ALTER FOREIGN TABLE shaped ALTER COLUMN k TYPE text;
SELECT sb_increment('x', 7, 'shaped');
SELECT sb_async_increment('y', 1, 'shaped');
INSERT INTO shaped VALUES ('x', 1), ('1', 4);
});
is( sql("SELECT k, n FROM shaped ORDER BY k"),
	"1|4\nx|8\ny|1",
	'after the type of the key has changed keys of the new type are counted');
is( sql("SELECT pending FROM sb_stat_buffers WHERE buffer = 'shaped'::regclass"
	),
	'113',
	'those counted before are still held');
sql("ALTER FOREIGN TABLE shaped OPTIONS (SET interval '10ms')");
wait_until(
	"SELECT state = 'failing' AND last_error LIKE '%altered%'
	 FROM sb_stat_buffers WHERE buffer = 'shaped'::regclass",
	'the view tells that they cannot be stored');
wait_until("SELECT k, n FROM stored_names ORDER BY k",
	'the others are stored', "1|4\nx|8\ny|1");
is(sql("SELECT sb_drain('shaped', '300ms')"),
	'f', 'a drain does not claim that all was stored');
is(stored('shaped'), '0', 'nothing was stored under a key that it is not');
sql("ALTER FOREIGN TABLE shaped ALTER COLUMN k TYPE int");
is(sql("SELECT sb_drain('shaped', '180s')"),
	't', 'with the type changed back the counts are flushed');
is( sql("SELECT count(*), sum(n), max(calls) FROM stored WHERE buffer = 'shaped'"
	),
	'50|100|1',
	'all of them, once');
is(sql("SELECT k, n FROM stored_names ORDER BY k"),
	"1|4\nx|8\ny|1", 'and the others not again');

# An increment and then a change of the column in one transaction
like(
	error_of(
		"BEGIN; SELECT sb_increment(1, 1, 'shaped');
		 ALTER FOREIGN TABLE shaped ALTER COLUMN k TYPE text; COMMIT;"),
	qr/ERROR/,
	'what was counted under the old type is not published under the new');
is(sql("SELECT coalesce(sb_count(1, 'shaped'), 0)"),
	'0', 'the transaction was rolled back');
is( sql(
		"SELECT atttypid::regtype FROM pg_attribute WHERE attrelid = 'shaped'::regclass AND attname = 'k'"
	),
	'integer',
	'all of it');
sql("DROP FOREIGN TABLE shaped");

#
# Buffers and the extension are dropped
#

# Ten buffers' keys would not fit in memory together, so one's memory is free
# when its worker has seen that it is gone.
sql(
	q{
CREATE FUNCTION gone_handler(k text, n bigint) RETURNS void
LANGUAGE sql AS '';
});
$log_start = -s $node->logfile;
my $filled = 0;
foreach my $round (1 .. 10)
{
	sql(
		q{
CREATE FOREIGN TABLE gone (k text NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'gone_handler', interval '1h', timeout '1h');
SELECT sb_start('gone')});
	$node->poll_query_until('postgres',
		"SELECT pid IS NOT NULL FROM sb_stat_buffers WHERE buffer = 'gone'::regclass"
	) or last;
	sql(
		"INSERT INTO gone SELECT repeat('x', 1000) || k, 1 FROM generate_series(1, 20000) AS k"
	);
	$filled += sql(
		"SELECT memory FROM sb_stat_buffers WHERE buffer = 'gone'::regclass");
	# the session has to have loaded the module for the worker to be told at once
	sql("LOAD 'statbuffer'; DROP FOREIGN TABLE gone");
	$node->poll_query_until('postgres',
		"SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'statbuffer worker' AND query LIKE 'gone%'",
		'0')
	  or last;
	$node->poll_query_until('postgres',
		"SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'statbuffer worker'",
		'0')
	  or last;
	pass("buffer $round was dropped with its counts, and its worker left");
}
cmp_ok($filled, '>', 3 * 64 * 1024 * 1024,
	'the memory of dropped buffers is used again');
unlike(slurp_file($node->logfile, $log_start),
	qr/ERROR|FATAL|PANIC/, 'dropping a buffer is no error');

# A handler is at work when all goes.
sql(
	q{
CREATE FUNCTION last_handler(k int, n bigint) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
	PERFORM store('last', ARRAY[k], ARRAY[n]);
	PERFORM pg_advisory_xact_lock_shared(gate) FROM waits_at;
END $$;
CREATE FOREIGN TABLE last (k int NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'last_handler', interval '50ms');
});
$gate = shut_gate();
sql("INSERT INTO waits_at VALUES ($gate->{number})");
sql("SELECT sb_increment(1, 1, 'last')");
wait_at_gate($gate, 'a handler is at work');
my $worker =
  sql("SELECT pid FROM sb_stat_buffers WHERE buffer = 'last'::regclass");
sql("SELECT sb_increment(2, 1, 'last')");
my $drop = session("SET application_name = 'drop'",
	'DROP EXTENSION statbuffer CASCADE');
wait_until(
	"SELECT EXISTS (SELECT FROM pg_stat_activity
	 WHERE application_name = 'drop' AND wait_event_type = 'Lock')",
	'DROP EXTENSION waits for its transaction');
open_gate($gate);
finish($drop, 'and goes through');
sql("DELETE FROM waits_at");
wait_until(
	"SELECT count(*) FROM pg_stat_activity WHERE pid = $worker",
	'the worker leaves', '0');
is(sql("SELECT k, n FROM stored WHERE buffer = 'last'"),
	'1|1', 'what was being stored is stored');

sql(
	q{
CREATE EXTENSION statbuffer;
CREATE FOREIGN TABLE last (k int NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'last_handler', interval '50ms');
SELECT sb_increment(3, 1, 'last');
});
is(sql("SELECT sb_drain('last', '180s')"),
	't', 'the extension can be created anew');
is(sql("SELECT k, n FROM stored WHERE buffer = 'last' ORDER BY k"),
	"1|1\n3|1", 'and counts');

$node->stop('fast');
unlike(slurp_file($node->logfile),
	qr/PANIC|TRAP|was terminated by signal/, 'the server never crashed');

done_testing();
