# The extension and its schema: renamed, with the default buffer moved out of
# it, dropped while handlers are in the middle of calls, and made anew.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use DdlTest;
use HandlerTest;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

# --- the extension ----------------------------------------------------------

sub test_extension
{
	my $offset;

	# The default buffer is where the extension is, whatever that is called.
	$node->safe_psql('postgres', 'CREATE DATABASE library');
	work_in('library');
	sql(q{
		CREATE SCHEMA counting;
		CREATE EXTENSION statbuffer SCHEMA counting;
		CREATE TABLE stored (key text, counter bigint);
		CREATE FUNCTION handle_flush(key text, counter bigint) RETURNS void LANGUAGE plpgsql AS $$
		BEGIN
			PERFORM pg_advisory_xact_lock_shared(4713);
			INSERT INTO stored VALUES (key, counter);
		END
		$$;
		SELECT counting.sb_start()});
	sql(q{ALTER FOREIGN TABLE counting.sb_default OPTIONS (interval '20ms', timeout '3s')});
	my $gate = close_gate($node, $db);
	sql(q{SELECT counting.sb_increment('k', 5)});
	wait_for($node, $db, q{SELECT in_flight = 5 FROM counting.sb_stat_buffers}, "$how, sb_default: a handler is in the middle of a call");
	sql(q{SELECT counting.sb_increment('k', 2)});

	like(error_of('ALTER EXTENSION statbuffer SET SCHEMA public', $how),
		qr/extension "statbuffer" does not support SET SCHEMA/, "$how, ALTER EXTENSION SET SCHEMA");
	sql('ALTER SCHEMA counting RENAME TO tallies');
	is(sql(q{SELECT tallies.sb_count('k')}), '7', "$how, sb_default: found where the schema is called otherwise");
	sql(q{SELECT tallies.sb_increment('k', 10)});
	open_gate($gate);
	wait_for($node, $db, 'SELECT sum(counter) = 17 FROM stored', "$how, sb_default: and stored");

	sql(q{ALTER FOREIGN TABLE tallies.sb_default OPTIONS (SET interval '1h')});
	sql(q{SELECT tallies.sb_increment('k', 3)});
	sql(q{ALTER FOREIGN TABLE tallies.sb_default SET SCHEMA public});
	like(error_of(q{SELECT tallies.sb_increment('k')}, $how), qr/there is no default buffer.*HINT/s,
		"$how, sb_default: elsewhere it is not the default one");
	is(sql(q{SELECT tallies.sb_count('k', 'sb_default')}), '3', "$how, sb_default: but one");
	sql('ALTER FOREIGN TABLE sb_default SET SCHEMA tallies');
	is(sql(q{SELECT tallies.sb_count('k')}), '3', "$how, sb_default: back again, it is");

	# Two buffers are busy when the extension is to go.
	sql(q{
		CREATE FOREIGN TABLE tallies.second (key text NOT NULL, count bigint NOT NULL)
		SERVER statbuffer OPTIONS (handler 'handle_flush', interval '1h', timeout '3s')});
	is(sql(q{SELECT tallies.sb_drain()}), 't', "$how, sb_default: drained");
	is(sql('SELECT sum(counter) FROM stored'), '20', "$how, sb_default: all is stored");
	$gate = close_gate($node, $db);
	sql(q{SELECT tallies.sb_increment('k', 5), tallies.sb_increment('k', 5, 'tallies.second')});
	sql(q{SELECT tallies.sb_flush_all(), tallies.sb_flush_all('tallies.second')});
	wait_for($node, $db, q{SELECT min(in_flight) = 5 FROM tallies.sb_stat_buffers}, "$how, DROP EXTENSION: handlers are in the middle of calls");
	sql(q{SELECT tallies.sb_increment('k', 30), tallies.sb_increment('k', 40, 'tallies.second')});

	$offset = -s $node->logfile;
	my $drop = start_statement('DROP EXTENSION statbuffer CASCADE');
	wait_for_waiting($drop, 'Lock');
	open_gate($gate);
	finish_statement($drop);
	wait_for_dropped(30, 1, $offset, 'DROP EXTENSION CASCADE, sb_default');
	wait_for_dropped(40, 1, $offset, 'DROP EXTENSION CASCADE, the other');
	wait_for_leaving($_) for qw(sb_default second);
	is(sql('SELECT sum(counter) FROM stored'), '30', "$how, DROP EXTENSION: what was being stored is stored");

	# Made anew elsewhere, it starts with nothing.
	sql(q{
		CREATE EXTENSION statbuffer;
		SELECT sb_start();
		SELECT sb_increment('k', 1)});
	is(sql(q{SELECT sb_drain()}), 't', "$how, CREATE EXTENSION again: drained");
	is(sql('SELECT sum(counter) FROM stored'), '31', "$how, CREATE EXTENSION again: only what is new is stored");
	work_in('postgres');
	$node->safe_psql($db, 'DROP DATABASE library WITH (FORCE)');
	return;
}

test_with_servers(\&test_extension);

# --- with a buffer of which a handler has one key in hand -------------------

$node = new_handler_node();

sql(q{
CREATE FUNCTION last_handler(k int, n bigint) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
	PERFORM store('last', ARRAY[k], ARRAY[n]);
	PERFORM pg_advisory_xact_lock_shared(4713);
END $$;
CREATE FOREIGN TABLE last (k int NOT NULL, n bigint NOT NULL)
SERVER statbuffer OPTIONS (handler 'last_handler', interval '50ms');
});
my $gate = close_gate($node, $db);
sql("SELECT sb_increment(1, 1, 'last')");
wait_at_gate($node, $db, 'a handler is at work');
my $worker = worker_of($node, $db, 'last');
sql("SELECT sb_increment(2, 1, 'last')");
my $drop = start_session($node, $db, 'DROP EXTENSION statbuffer CASCADE');
wait_for_session($drop, q{wait_event_type = 'Lock'}, 'DROP EXTENSION waits for its transaction');
open_gate($gate);
finish_session($drop, 'and goes through');
wait_for($node, $db,
	"SELECT count(*) FROM pg_stat_activity WHERE pid = $worker",
	'the worker leaves', '0');
is(sql("SELECT k, n FROM stored WHERE buffer = 'last'"),
	'1|1', 'what was being stored is stored');

sql(q{
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
has_not_crashed($node, 'the server never crashed');

done_testing();
