# Handlers that take their time, or never come back.  A handler stores a key,
# and then treats it as the table "manners" says.  Whatever takes time there
# takes an hour, so that whoever waits for it is seen: statements are cut off
# after a minute, and what is polled for does not come.

package SlowTest;

use strict;
use warnings;

use Exporter 'import';
use StatbufferTest;
use Test::More;

our @EXPORT = qw(
  $definitions make_slow in_time is_stored wait_for_sum
  get_stuck wait_for_sleeper make_elsewhere
);

# What every database needs: the ways to behave.  A handler stores a key, and
# behaves badly then, so that all that it has done has to be undone.
our $definitions = q{
	CREATE TABLE calls (buffer text, key text, counter bigint);
	CREATE TABLE manners (key text PRIMARY KEY, manner text);
	CREATE SEQUENCE begun;
	CREATE SEQUENCE caught;

	CREATE FUNCTION behave(bad text) RETURNS void LANGUAGE plpgsql AS $$
	DECLARE
		manner text := (SELECT m.manner FROM manners m WHERE m.key = bad);
		n int := 0;
	BEGIN
		IF manner = 'sleep' THEN
			PERFORM pg_sleep(3600);
		ELSIF manner = 'wait' THEN
			PERFORM pg_advisory_xact_lock_shared(4713);
		ELSIF manner = 'loop' THEN
			LOOP
				n := (n + 1) % 1000;
			END LOOP;
		ELSIF manner LIKE 'catch%' THEN
			-- once, or three times, or again and again
			LOOP
				BEGIN
					PERFORM pg_sleep(3600);
				EXCEPTION WHEN query_canceled THEN
					PERFORM nextval('caught');
					n := n + 1;
				END;
				EXIT WHEN n = substr(manner, 7)::int;
			END LOOP;
		ELSIF manner = 'twice' THEN
			-- its time is up, and then it is cancelled; the next time it has time
			IF nextval('caught') = 1 THEN
				BEGIN
					PERFORM pg_sleep(3600);
				EXCEPTION WHEN query_canceled THEN
					PERFORM pg_cancel_backend(pg_backend_pid());
				END;
				PERFORM pg_sleep(3600);
			END IF;
		ELSIF manner = 'cancel' THEN
			RAISE query_canceled USING MESSAGE = 'cancelled by itself';
		ELSIF manner = 'doze' THEN
			PERFORM pg_sleep(0.2);
		END IF;
	END $$;
};

# make_slow(NODE, DATABASE, NAME, FORM, OPTIONS): a buffer whose handler takes
# one key a call, or arrays.
sub make_slow
{
	my ($node, $database, $name, $form, $options) = @_;

	$node->safe_psql($database, $form eq 'arrays' ? qq{
		CREATE FUNCTION ${name}_store(keys text[], counters bigint[]) RETURNS void
		LANGUAGE plpgsql AS \$\$
		BEGIN
			PERFORM nextval('begun');
			INSERT INTO calls SELECT '$name', * FROM unnest(keys, counters);
			PERFORM behave(key) FROM unnest(keys) AS key;
		END \$\$;
	} : qq{
		CREATE FUNCTION ${name}_store(key text, counter bigint) RETURNS void
		LANGUAGE plpgsql AS \$\$
		BEGIN
			PERFORM nextval('begun');
			INSERT INTO calls VALUES ('$name', key, counter);
			PERFORM behave(key);
		END \$\$;
	});
	$node->safe_psql($database, qq{
		CREATE FOREIGN TABLE $name (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
		SERVER statbuffer OPTIONS (handler '${name}_store', interval '20ms', $options)});
}

# in_time(NODE, DATABASE, STATEMENT...): runs statements, each a transaction,
# that must not wait for a handler.
sub in_time
{
	my ($node, $database, @statements) = @_;

	return $node->safe_psql($database, join(";\n", q{SET statement_timeout = '60s'}, @statements));
}

# is_stored(NODE, DATABASE, BUFFER, EXPECTED, WHAT): what is stored for a
# buffer, as a test: rows, keys and sum.
sub is_stored
{
	my ($node, $database, $buffer, $expected, $what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	is($node->safe_psql($database, qq{
			SELECT count(*), count(DISTINCT key), coalesce(sum(counter), 0)
			FROM calls WHERE buffer = '$buffer'}),
		$expected, $what);
}

# wait_for_sum(NODE, DATABASE, BUFFER, SUM, WHAT): polls until the counts
# stored for a buffer add up to this, as a test.
sub wait_for_sum
{
	my ($node, $database, $buffer, $sum, $what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	wait_for($node, $database,
		"SELECT coalesce(sum(counter), 0) = $sum FROM calls WHERE buffer = '$buffer'", $what);
}

# get_stuck(NODE, DATABASE, BUFFER, COUNT[, MANNER]): counts a key for which
# the handler does not come back, and waits until it is at work.
sub get_stuck
{
	my ($node, $database, $buffer, $count, $manner) = @_;

	$manner //= 'sleep';
	$node->safe_psql($database, qq{
		INSERT INTO manners VALUES ('stuck', '$manner')
		ON CONFLICT (key) DO UPDATE SET manner = EXCLUDED.manner;
		SELECT sb_increment('stuck', $count, '$buffer')});
	local $Test::Builder::Level = $Test::Builder::Level + 1;
	wait_for($node, $database,
		"SELECT in_flight = $count FROM sb_keys('$buffer') WHERE key = 'stuck'",
		"$buffer: the handler is at work");
	wait_for_sleeper($node, $database, $buffer) if $manner eq 'sleep';
}

# wait_for_sleeper(NODE, DATABASE, BUFFER): polls until its handler sleeps, as
# a test.
sub wait_for_sleeper
{
	my ($node, $database, $buffer) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	wait_for($node, $database, qq{
			SELECT wait_event = 'PgSleep' FROM sb_stat_buffers JOIN pg_stat_activity a USING (pid)
			WHERE relid = '$buffer'::regclass},
		"$buffer: and asleep");
}

# make_elsewhere(NODE, SHUTDOWN): the database "elsewhere" with a handler
# asleep.
sub make_elsewhere
{
	my ($node, $shutdown) = @_;

	$node->safe_psql('postgres', 'CREATE DATABASE elsewhere');
	$node->safe_psql('elsewhere', "CREATE EXTENSION statbuffer; $definitions");
	make_slow($node, 'elsewhere', 'stuck', 'one key', qq{shutdown '$shutdown'});
	get_stuck($node, 'elsewhere', 'stuck', 1);
}

1;
