# Handlers that take their time, that are cut off, that collide with other
# transactions, and that count themselves: increments do not wait for them,
# what loses a deadlock or cannot be serialized is tried again at once, and
# everything is stored once.

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

# --- a handler takes its time -----------------------------------------------

sql(q{
CREATE FUNCTION slow_handler(k int[], n bigint[]) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
	PERFORM store('slow', k, n);
	PERFORM pg_advisory_xact_lock_shared(4713);
END $$;
CREATE FOREIGN TABLE slow (k int NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'slow_handler', interval '50ms');
});
my $gate = close_gate($node, $db);
sql("SELECT sb_increment(1, 100, 'slow')");
wait_at_gate($node, $db, 'the handler is at work');
is(sql("SELECT key, count, in_flight FROM sb_keys('slow')"),
	'1|0|100', 'the count is in flight');

# Each of these is a transaction of its own and must not wait.
sql("SET statement_timeout = '60s';\n"
	  . "SELECT sb_increment(1, 1, 'slow');\n" x 200
	  . "SELECT sb_async_increment(2, 1, 'slow');\n" x 100
	  . "INSERT INTO slow SELECT 3, 1 FROM generate_series(1, 10);\n" x 10);
pass('increments do not wait for the handler');
is(sql("SELECT sb_count(1, 'slow'), sb_count(2, 'slow'), sb_count(3, 'slow')"),
	'300|100|100',
	'what is in flight counts as counted');
is(sql("SELECT key, count, in_flight FROM sb_keys('slow') ORDER BY key"),
	"1|200|100\n2|100|0\n3|100|0",
	'and the same flush still goes on');
like(sql("SELECT sb_drain('slow', '100ms')"),
	qr/^f$/, 'a drain that runs out of time says so');
open_gate($gate);
is(sql("SELECT sb_drain('slow', '180s')"), 't', 'the gate is open: drained');
is(sql("SELECT k, n FROM stored WHERE buffer = 'slow' ORDER BY k"),
	"1|300\n2|100\n3|100",
	'all arrived, once');
sql("DROP FOREIGN TABLE slow");

# One that takes too long is cut off.
sql(q{
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
wait_for($node, $db,
	"SELECT failures > 1 AND last_error LIKE '%200 ms%' FROM sb_keys('endless') WHERE key = '5'",
	'a handler that takes longer than handler_timeout has failed');
is(sql("SELECT count(*), sum(n) FROM stored WHERE buffer = 'endless'"),
	'9|90', 'the other keys of its batch are stored');
is(sql("SELECT sb_count(5, 'endless')"), '10', 'the key keeps its count');
sql("DELETE FROM poison WHERE buffer = 'endless'");
wait_for($node, $db, "SELECT count(*) FROM endless", 'it is stored once it can be',
	'0');
is(sql("SELECT sum(n), max(calls) FROM stored WHERE buffer = 'endless'"),
	'100|1', 'everything exactly once');
sql("DROP FOREIGN TABLE endless");

# --- handlers collide with other transactions -------------------------------

# The worker is always the one that finds a deadlock, and so its victim: it
# looks after 10 ms, and the application after an hour.
sql(q{
CREATE ROLE keeper LOGIN;
GRANT USAGE ON FOREIGN SERVER statbuffer TO keeper;
GRANT ALL ON stored, poison TO keeper;
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
	PERFORM pg_advisory_xact_lock_shared(4713);
	UPDATE accounts a SET n = a.n + transfer_handler.n WHERE id = 2;
END $$;
CREATE FOREIGN TABLE transfers (k int NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'transfer_handler', interval '50ms', backoff '1h');
ALTER FOREIGN TABLE transfers OWNER TO keeper;
});
$gate = close_gate($node, $db);
sql("SELECT sb_increment(1, 10, 'transfers')");
wait_at_gate($node, $db, 'the handler has locked the first account');
my $application = start_session($node, $db,
	"SET deadlock_timeout = '1h'",
	'BEGIN',
	'UPDATE accounts SET n = n + 1 WHERE id = 2',
	'UPDATE accounts SET n = n + 1 WHERE id = 1',
	'COMMIT');
wait_for_session($application, q{wait_event_type = 'Lock'},
	'the application has locked the second and waits for the first');
open_gate($gate);
finish_session($application, 'the application wins the deadlock');
wait_for($node, $db, "SELECT count(*) FROM transfers",
	'the flush is tried again without a back-off', '0');
is(sql("SELECT id, n FROM accounts ORDER BY id"),
	"1|11\n2|11", 'both are stored exactly once');
cmp_ok(sql("SELECT last_value FROM attempts"),
	'>', 1, 'it did take more than one attempt');
is(sql("SELECT failures, state IN ('running', 'idle') FROM sb_stat_buffers
		 WHERE buffer = 'transfers'"),
	'0|t',
	'a deadlock is not a failure');
is(sql("SELECT count(*) FROM sb_keys('transfers') WHERE failures > 0 OR last_error IS NOT NULL"),
	'0', 'nor is the key to blame');

# The same with an owner whose transactions are serializable, one of which
# has read what another transaction then changes.
sql(q{
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
	PERFORM pg_advisory_xact_lock_shared(4713);
	UPDATE accounts a SET n = a.n + total_handler.n WHERE id = 1;
END $$;
CREATE FOREIGN TABLE totals (k int NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'total_handler', interval '50ms', backoff '1h');
ALTER FOREIGN TABLE totals OWNER TO keeper;
});
$gate = close_gate($node, $db);
sql("SELECT sb_increment(1, 10, 'totals')");
wait_at_gate($node, $db, 'the handler has read the account');
sql("UPDATE accounts SET n = n + 1 WHERE id = 1");
open_gate($gate);
wait_for($node, $db, "SELECT count(*) FROM totals",
	'the flush is tried again after a serialization failure, without a back-off',
	'0');
is(sql("SELECT n FROM accounts WHERE id = 1"),
	'11', 'both are stored exactly once');
cmp_ok(sql("SELECT last_value FROM attempts"),
	'>', 1, 'it did take more than one attempt');
is(sql("SELECT DISTINCT level FROM isolation_seen"),
	'serializable', "the transaction is of the owner's kind");
is(sql("SELECT failures, state IN ('running', 'idle') FROM sb_stat_buffers
		 WHERE buffer = 'totals'"),
	'0|t',
	'a serialization failure is not a failure');
sql("DROP FOREIGN TABLE totals");

# --- a handler counts -------------------------------------------------------

sql(q{
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
wait_for($node, $db, "SELECT key FROM sb_keys('detail') WHERE failures > 2 ORDER BY key",
	'a handler that counts fails for two keys', "-17\n13");
sql("DELETE FROM poison WHERE buffer = 'detail'");
wait_for($node, $db, "SELECT count(*) FROM sb_keys('detail') WHERE count + in_flight <> 0",
	'a handler that counts in its own buffer comes to an end', '0');
is(sql("SELECT sb_drain('rollup', '180s')"), 't', 'so does the other buffer');
is(sql("SELECT sign(k), count(*), sum(n), max(calls) FROM stored
		 WHERE buffer = 'detail' GROUP BY 1 ORDER BY 1"),
	"-1|99|4950|1\n1|99|4950|1",
	'what it counts in its own buffer is stored once');
is(sql("SELECT count(*), sum(n) FROM stored s
		 WHERE buffer = 'rollup'
		 AND n = (SELECT 2 * sum(g) FROM generate_series(1, 99) AS g WHERE g / 10 = s.k)"),
	'10|9900',
	'and so is what it counts in another');
sql("DROP FOREIGN TABLE detail, rollup");

$node->stop('fast');
has_not_crashed($node, 'the server never crashed');

done_testing();
