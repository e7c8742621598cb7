# The processes, preloaded and not: they start when they should, come back
# when they are terminated without a count being lost, tell what they do, and
# follow changed settings.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $db = 'postgres';

# Everything that follows holds either way.
sub test_processes
{
	my ($node, $how) = @_;

	# A worker says which buffer it is for, and what it does.
	make_buffer($node, $db, 'views', q{interval '50ms', timeout '1h', shutdown '0'});
	my $gate = close_gate($node, $db);
	increment($node, $db, 'views', 'k', 1000);
	wait_for($node, $db, q{
			SELECT count(*) = 1 FROM pg_stat_activity
			WHERE backend_type = 'statbuffer worker' AND state = 'active'
				AND query LIKE '%views%flush%' AND datname = 'postgres' AND usename = current_user},
		"$how: pg_stat_activity tells what the worker does");

	# Its statistics are those of its process.
	# Another one may have come to free idle keys.
	my $worker = worker_of($node, $db, 'views');
	ok((grep { $_ == $worker } processes($node, 'statbuffer worker')), "$how: it is one of the workers");
	is($node->safe_psql($db, q{SELECT pid, state, in_flight FROM sb_stat_buffers WHERE buffer = 'views'}),
		"$worker|running|1000", "$how: and so does sb_stat_buffers");

	# It is terminated with a flush under way: the next one stores it.
	$node->safe_psql($db, "SELECT pg_terminate_backend($worker)");
	increment($node, $db, 'views', 'k', 1);
	wait_for($node, $db, qq{
			SELECT pid <> $worker AND in_flight = 1001 FROM sb_stat_buffers WHERE buffer = 'views'},
		"$how: another worker takes over when one is terminated");
	open_gate($gate);
	wait_for_stored($node, $db, 'views', 1001, "$how: and stores what that one had in flight");
	is($node->safe_psql($db, q{SELECT sb_count('k', 'views')}), '0', "$how: once");

	# Not preloaded, it stays for a second at most.
	wait_for($node, $db, q{
			SELECT count(*) = 1 FROM pg_stat_activity
			WHERE backend_type = 'statbuffer worker' AND state = 'idle' AND query LIKE '%views%'},
		"$how: the worker is idle, and still tells its buffer") if $how eq 'preloaded';

	# The launcher is terminated: another one comes, and starts workers.
	my ($launcher) = processes($node, 'statbuffer launcher');
	$node->safe_psql($db, "SELECT pg_terminate_backend($launcher)");
	make_buffer($node, $db, 'others', q{interval '50ms', timeout '1h'});
	increment($node, $db, 'others', 'k', 7);
	wait_for_stored($node, $db, 'others', 7, "$how: a new buffer is flushed after the launcher was terminated");
	my @launchers = processes($node, 'statbuffer launcher');
	is(scalar @launchers, 1, "$how: there is one launcher");
	isnt($launchers[0], $launcher, "$how: another one");

	# Both are terminated again and again while sessions count.
	my @clients = map { start_session($node, $db, q{
			DO $$
			BEGIN
				FOR i IN 1 .. 3000 LOOP
					PERFORM sb_increment('k' || i % 5, 1, 'others');
					PERFORM sb_async_increment('a' || i % 3, 10, 'others');
					COMMIT;
					PERFORM pg_sleep(0.001);
				END LOOP;
			END
			$$})
	} 1 .. 3;
	for (1 .. 8)
	{
		$node->safe_psql($db, q{
			SELECT pg_terminate_backend(pid), pg_sleep(0.1) FROM pg_stat_activity
			WHERE backend_type IN ('statbuffer worker', 'statbuffer launcher')});
	}
	my $said = join '', map { finish_session($_, "$how: a client has done its work") } @clients;
	is($said, '', "$how: and did not notice");
	is($node->safe_psql($db, q{SELECT sb_drain('others')}), 't', "$how: drained, after all");
	is(stored($node, $db, 'others'), 7 + 3 * 3000 * 11, "$how: stored to the last one");

	# Changed settings reach the worker, and the handler that it calls.
	$node->safe_psql($db, q{
		CREATE TABLE settings (work_mem text);
		CREATE FUNCTION note_setting(key text, counter bigint) RETURNS void
		LANGUAGE sql AS $$ INSERT INTO settings VALUES (current_setting('work_mem')) $$;
		CREATE FOREIGN TABLE notes (key text NOT NULL, count bigint NOT NULL)
		SERVER statbuffer OPTIONS (handler 'note_setting', interval '10ms', timeout '1h');
		SELECT sb_increment('k', 1, 'notes');
		SELECT sb_drain('notes');
	});
	my $same = worker_of($node, $db, 'notes');
	$node->safe_psql($db, q{ALTER SYSTEM SET work_mem = '7777kB'});
	$node->reload;
	wait_for($node, $db, q{
			WITH again AS MATERIALIZED (SELECT sb_increment('k', 1, 'notes') AS done)
			SELECT EXISTS (SELECT FROM settings WHERE work_mem = '7777kB') FROM again},
		"$how: a changed setting reaches the handler");
	is(worker_of($node, $db, 'notes'), $same, "$how: and the worker goes on") if $how eq 'preloaded';
}

# --- preloaded --------------------------------------------------------------

my $node = PostgreSQL::Test::Cluster->new('preloaded');
$node->init;
$node->append_conf('postgresql.conf', qq{
shared_preload_libraries = 'statbuffer'
max_worker_processes = 16
log_line_prefix = '%m [%p] %b %q%a '
});
$node->start;
wait_for($node, $db, q{SELECT count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'statbuffer launcher'},
	'preloaded: the launcher starts with the server');
$node->safe_psql($db, 'CREATE EXTENSION statbuffer');
is($node->safe_psql($db, q{SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'statbuffer worker'}),
	'0', 'preloaded: but no worker');
test_processes($node, 'preloaded');

$node->restart;
wait_for($node, $db, q{SELECT count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'statbuffer launcher'},
	'preloaded: the launcher is there after a restart');
increment($node, $db, 'views', 'again', 5);
wait_for_stored($node, $db, 'views', 1006, 'preloaded: buffers work after a restart');
$node->stop;

# --- not preloaded ----------------------------------------------------------

$node = PostgreSQL::Test::Cluster->new('running');
$node->init;
$node->append_conf('postgresql.conf', qq{
max_worker_processes = 16
log_line_prefix = '%m [%p] %b %q%a '
});
$node->start;

# The extension comes to a server that runs, and that it does not disturb.
$node->safe_psql($db, 'CREATE EXTENSION statbuffer');
make_buffer($node, $db, 'first', q{interval '50ms', timeout '2s'});
is($node->safe_psql($db, q{SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'statbuffer%'}),
	'0', 'not preloaded: there is no process before the first increment');
increment($node, $db, 'first', 'k', 3);
wait_for_stored($node, $db, 'first', 3, 'not preloaded: the first increment is flushed');
is(scalar(my @launchers = processes($node, 'statbuffer launcher')), 1, 'not preloaded: it brought up a launcher');
wait_for_no_worker($node, 'not preloaded: the worker has left');
test_processes($node, 'not preloaded');

$node->restart;
is($node->safe_psql($db, q{SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'statbuffer%'}),
	'0', 'not preloaded: no process after a restart');
increment($node, $db, 'views', 'again', 5);
wait_for_stored($node, $db, 'views', 1006, 'not preloaded: buffers work after a restart');

# What a handler cannot store is saved by a stop.  Nobody loads it until the
# extension is used; the log says so, and whoever looks at the view uses it.
$node->safe_psql($db, q{
	INSERT INTO first_bad VALUES ('bad');
	SELECT sb_increment('bad', 7, 'first')});
wait_for($node, $db, q{SELECT state = 'failing' FROM sb_stat_buffers WHERE buffer = 'first'},
	'not preloaded: a handler fails');
my $offset = -s $node->logfile;
$node->restart;
$node->wait_for_log(
	qr/statbuffer has saved counts that are not yet stored\n.*DETAIL:  They are of 1 key\.\n.*HINT:  As the library is not preloaded, they stay in the file "statbuffer\.saved" until/,
	$offset);
ok(-e $node->data_dir . '/statbuffer.saved', 'not preloaded: counts wait in the file');
my (undef, undef, $err) = $node->psql($db, 'SHOW statbuffer.max_memory');
like($err, qr/unrecognized configuration parameter/, 'not preloaded: settings are not known before the first use');
is($node->safe_psql($db, 'SELECT max_memory FROM sb_stat_memory; SHOW statbuffer.max_memory'), "268435456\n256MB",
	'not preloaded: sb_stat_memory shows it, and then SHOW does');
is($node->safe_psql($db, q{SELECT pending + in_flight FROM sb_stat_buffers WHERE buffer = 'first'}), '7',
	'not preloaded: who looks at the view has the counts loaded');
ok(!-e $node->data_dir . '/statbuffer.saved', 'not preloaded: and the file is gone');
$node->stop;

done_testing();
