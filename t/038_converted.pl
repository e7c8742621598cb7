# What is held when key columns get other types is converted: under load, while a
# drain waits, by the worker if the session has not loaded the library, through
# prepared transactions and restarts, and where sessions, workers or the server
# end in the middle.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $db = 'postgres';
my $node = new_node('converted', 'max_prepared_transactions = 5', 'restart_after_crash = on',
	q{shared_preload_libraries = 'statbuffer'});

# A buffer whose counts go to a table by their keys' text, whatever their type
sub make
{
	my ($name, $type, $options) = @_;

	sql(qq{
		CREATE TABLE ${name}_stored (key text, n bigint);
		CREATE FOREIGN TABLE $name (key $type, n bigint NOT NULL DEFAULT 1)
		SERVER statbuffer OPTIONS (handler '${name}_store', timeout '1h', $options)});
	foreach (qw(int bigint text varchar))
	{
		sql(qq{
			CREATE FUNCTION ${name}_store(key $_, n bigint) RETURNS void LANGUAGE sql AS
			\$\$ INSERT INTO ${name}_stored VALUES (key::text, n) \$\$});
	}
	return;
}

sub held
{
	my ($name) = @_;

	return sql(qq{SELECT count(*), sum(n) FROM $name});
}

sub in_table
{
	my ($name) = @_;

	return sql(qq{SELECT count(DISTINCT key), coalesce(sum(n), 0) FROM ${name}_stored});
}

# --- under load --------------------------------------------------------------

make('busy', 'int', q{interval '2ms'});
my @sessions = map {
	start_session($node, $db, q{
		DO $$ BEGIN FOR i IN 1 .. 1500 LOOP
			INSERT INTO busy SELECT k FROM generate_series(1, 10) AS k;
			COMMIT;
		END LOOP; END $$})
} 1 .. 3;
for (1 .. 12)
{
	my $type = qw(bigint text varchar int) [ $_ % 4 ];
	sql(qq{ALTER FOREIGN TABLE busy ALTER key TYPE $type});
}
finish_session($_, 'a session has counted all the while') foreach @sessions;
is(sql(qq{SELECT sb_drain('busy', '$patience')}), 't', 'under load: all is drained');
is(in_table('busy'), '10|45000', 'under load: each count is stored once, whatever its type was');

# --- while a drain waits -----------------------------------------------------

make('slow', 'int', q{interval '1h', batch_size '1'});
sql(q{INSERT INTO slow SELECT i, 1 FROM generate_series(1, 20) i});
my $gate = close_gate($node, $db);
sql(q{
	CREATE OR REPLACE FUNCTION slow_store(key int, n bigint) RETURNS void LANGUAGE plpgsql AS $$
	BEGIN
		PERFORM pg_advisory_xact_lock_shared(4713);
		INSERT INTO slow_stored VALUES (key::text, n);
	END $$});
my $drain = start_session($node, $db, qq{SELECT sb_drain('slow', '$patience')});
wait_for($node, $db, q{SELECT in_flight = 1 FROM sb_stat_buffers WHERE buffer = 'slow'}, 'a drain: the handler is in the first call');
my $alter = start_session($node, $db, q{ALTER FOREIGN TABLE slow ALTER key TYPE bigint});
wait_for_session($alter, q{wait_event_type = 'Lock'}, 'a drain: the columns are to be altered meanwhile');
open_gate($gate);
finish_session($alter, 'a drain: they are');
finish_session($drain, 'a drain: it ends');
is($drain->{out}, "t\n", 'a drain: it says that all is stored');
is(in_table('slow'), '20|20', 'a drain: and it is');

# --- nobody has told us ------------------------------------------------------

# A session without the library tells nobody; nor does one that commits what was
# prepared.  Once somebody looks, the worker is asked to convert.
make('prepared', 'int', q{interval '1h'});
sql(q{INSERT INTO prepared VALUES (1, 1), (2, 2)});
sql(q{BEGIN; ALTER FOREIGN TABLE prepared ALTER key TYPE text; SELECT count(*) FROM prepared; PREPARE TRANSACTION 'p'});
sql(q{ROLLBACK PREPARED 'p'});
is(held('prepared'), '2|3', 'prepared, and rolled back: as it was');
is(sql(q{SELECT sb_count(1, 'prepared')}), '1', 'prepared, and rolled back: with its type');
sql(q{BEGIN; ALTER FOREIGN TABLE prepared ALTER key TYPE text; PREPARE TRANSACTION 'p'});
sql(q{COMMIT PREPARED 'p'});
wait_for($node, $db, q{SELECT string_agg(key || '=' || n, ' ' ORDER BY key) FROM prepared},
	'prepared, and committed: the worker converts', '1=1 2=2');

# --- sessions that end in the middle -----------------------------------------

make('broken', 'int', q{interval '1h'});
sql(q{
	CREATE TYPE word AS ENUM ('1', '2', '3');
	CREATE FUNCTION to_word(i int) RETURNS word LANGUAGE plpgsql AS $$
	BEGIN
		IF i = 3 AND current_setting('test.free', true) IS NULL THEN
			PERFORM pg_advisory_xact_lock_shared(4713);
		END IF;
		RETURN i::text::word;
	END $$;
	CREATE CAST (int AS word) WITH FUNCTION to_word AS ASSIGNMENT;
	INSERT INTO broken VALUES (1, 1), (2, 2), (3, 4)});
foreach my $end ('pg_cancel_backend', 'pg_terminate_backend')
{
	$gate = close_gate($node, $db);
	my $session = start_session($node, $db, q{LOAD 'statbuffer'}, q{ALTER FOREIGN TABLE broken ALTER key TYPE word});
	wait_for_session($session, q{wait_event_type = 'Lock'}, "$end: in the middle of a conversion");
	sql(qq{SELECT $end(pid) FROM pg_stat_activity WHERE application_name = '$session->{name}'});
	ok(!$session->{run}->finish, "$end: that fails");
	open_gate($gate);
	is(held('broken'), '3|7', "$end: everything is as it was");
	is(sql(q{SELECT count(*), sum(count) FROM sb_keys('broken') WHERE count <> 0}), '3|7', "$end: nothing is there twice");
}

# The worker converts, and is terminated in the middle of that.
sql(q{SET test.free = '1'; BEGIN; ALTER FOREIGN TABLE broken ALTER key TYPE word; PREPARE TRANSACTION 'w'});
$gate = close_gate($node, $db);
sql(q{COMMIT PREPARED 'w'});
sql(q{SELECT count(*) FROM broken});
wait_at_gate($node, $db, 'a worker: in the middle of a conversion');
like(sql(q{SELECT count(*), coalesce(sum(n), 0) FROM broken}), qr/^(0\|0|1\|[12]|2\|3)$/, 'a worker: what is converted is there once');
is(sql(q{SELECT pg_terminate_backend(pid) FROM sb_stat_buffers WHERE buffer = 'broken'}), 't', 'a worker: terminated');
open_gate($gate);
wait_for($node, $db, q{SELECT string_agg(key || '=' || n, ' ' ORDER BY key) FROM broken},
	'a worker: the next one goes on', '1=1 2=2 3=4');
is(sql(q{SELECT pending FROM sb_stat_buffers WHERE buffer = 'broken'}), '7', 'a worker: each count is there once');

# --- restarts ----------------------------------------------------------------

# What cannot be converted is saved as what it was counted, and converted when
# that is possible.
make('saved', 'text', q{interval '1h', shutdown '0'});
sql(q{INSERT INTO saved VALUES ('1', 1), ('two', 2), ('3', 4)});
sql(q{ALTER FOREIGN TABLE saved ALTER key TYPE int});
is(held('saved'), '2|5', 'saved: what fits is converted');
$node->restart;
is(held('saved'), '2|5', 'saved: and is there after a restart');
wait_for($node, $db, q{
		SELECT key || ' ' || count || ' ' || last_error FROM sb_keys('saved') WHERE last_error IS NOT NULL AND failures > 0},
	'saved: and so is the rest, which cannot be converted',
	'two 2 could not convert the key to the altered key columns: invalid input syntax for type integer: "two"');
sql(q{ALTER FOREIGN TABLE saved ALTER key TYPE varchar});
is(sql(qq{SELECT sb_drain('saved', '$patience')}), 't', 'saved: to a third type it can, and all is drained');
is(in_table('saved'), '3|7', 'saved: stored');

# Not preloaded, the columns are altered before anybody has the counts loaded.
sql(q{INSERT INTO saved VALUES ('1', 1), ('two', 2), ('3', 4)});
$node->stop;
$node->append_conf('postgresql.conf', q{shared_preload_libraries = ''});
$node->start;
sql(q{ALTER FOREIGN TABLE saved ALTER key TYPE text});
wait_for($node, $db, q{SELECT string_agg(key || '=' || n, ' ' ORDER BY key) FROM saved},
	'not loaded: the worker converts what is loaded later', '1=1 3=4 two=2');
sql(q{ALTER FOREIGN TABLE saved ALTER key TYPE int});
wait_for($node, $db, q{SELECT string_agg(key || '=' || n, ' ' ORDER BY key) FROM saved},
	'not loaded: what a session without the library alters, too', '1=1 3=4');
sql(q{ALTER FOREIGN TABLE saved ALTER key TYPE text});
is(sql(qq{SELECT sb_drain('saved', '$patience')}), 't', 'not loaded: drained');
is(in_table('saved'), '3|14', 'not loaded: stored');

# kill -9 in the middle: what was not stored is lost, as ever, and nothing is
# stored twice.
sql(q{TRUNCATE broken; INSERT INTO saved VALUES ('9', 9)});
sql(q{ALTER FOREIGN TABLE broken ALTER key TYPE int});
sql(q{INSERT INTO broken VALUES (3, 3)});
$gate = close_gate($node, $db);
my $victim = start_session($node, $db, q{LOAD 'statbuffer'}, q{ALTER FOREIGN TABLE broken ALTER key TYPE word});
wait_for_session($victim, q{wait_event_type = 'Lock'}, 'killed: in the middle of a conversion');
my $pid = sql(qq{SELECT pid FROM pg_stat_activity WHERE application_name = '$victim->{name}'});
my $offset = -s $node->logfile;
kill 'KILL', $pid;
$node->wait_for_log(qr/\(PID $pid\) was terminated by signal 9/, $offset);
$node->wait_for_log(qr/database system is ready to accept connections/, $offset);
$victim->{run}->finish;
eval { $gate->quit };
is(sql(q{SELECT count(*) FROM broken}), '0', 'killed: what was not stored is gone');
is(in_table('saved'), '3|14', 'killed: what was stored is stored');
sql(q{INSERT INTO broken VALUES (1, 5); ALTER FOREIGN TABLE broken ALTER key TYPE word});
is(held('broken'), '1|5', 'killed: and the buffer works');

$node->stop;
done_testing();
