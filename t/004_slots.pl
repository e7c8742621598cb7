# More busy buffers than workers, and no worker at all: flushes wait, nothing
# is lost, and the log says so once.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $db = 'postgres';

# --- more busy buffers than workers -----------------------------------------

my $node = new_node('slots', 'statbuffer.max_workers = 2',
	q{shared_preload_libraries = 'statbuffer'});
my @buffers = map { "b$_" } 1 .. 12;
make_buffer($node, $db, $_, q{interval '100ms', timeout '1h'}) for @buffers;

# Notes the most workers that are seen at a time.
my $most_workers = 0;
sub look_at_workers
{
	my @workers = processes($node, 'statbuffer worker');

	$most_workers = @workers if @workers > $most_workers;
}

for my $round (1 .. 3)
{
	for my $i (1 .. 12)
	{
		$node->safe_psql($db, "INSERT INTO b$i SELECT 'k' || k, $i FROM generate_series(1, 10) k");
		look_at_workers();
	}
}
for my $i (1 .. 12)
{
	look_at_workers();
	wait_for_stored($node, $db, "b$i", 30 * $i, "buffer $i of 12 with 2 workers is flushed");
}
cmp_ok($most_workers, '<=', 2, 'there never were more than two workers');

# --- another number of them -------------------------------------------------

# The handlers are held up, so that every worker that there may be is busy.
my $gate = close_gate($node, $db);
increment($node, $db, $_, 'held', 1000) for @buffers;
sub wait_for_in_flight
{
	my ($n, $what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	wait_for($node, $db, "SELECT count(*) = $n FROM sb_stat_buffers WHERE in_flight = 1000", $what);
}
wait_for_in_flight(2, 'two workers are at work');
is(scalar(my @two = processes($node, 'statbuffer worker')), 2, 'and there is no third');
is($node->safe_psql($db, 'SELECT sum(pending + in_flight) FROM sb_stat_buffers'), '12000', 'the others wait');
$node->wait_for_log(qr/out of statbuffer worker slots\n.*\d+ buffers? with due keys waits?; the workers take turns/);
pass('the log tells that there are not enough');

$node->safe_psql($db, 'ALTER SYSTEM SET statbuffer.max_workers = 7');
$node->reload;
wait_for_in_flight(7, 'seven workers are at work as soon as there may be seven');

$node->safe_psql($db, 'ALTER SYSTEM SET statbuffer.max_workers = 1');
$node->reload;
open_gate($gate);
for my $i (1 .. 12)
{
	wait_for_stored($node, $db, "b$i", 30 * $i + 1000, "buffer $i of 12 is flushed");
}
is($node->safe_psql($db, 'SELECT sum(keys), sum(pending), sum(in_flight) FROM sb_stat_buffers'), '132|0|0', 'all is stored');

# What is asked for has its turn, too.
increment($node, $db, $_, 'asked', 5) for @buffers;
is($node->safe_psql($db, 'SELECT count(*) FROM sb_stat_buffers WHERE sb_drain(relid)'), '12', 'with one worker: all can be drained');
is($node->safe_psql($db, join ' UNION ALL ', map { "SELECT sum(counter) FROM ${_}_calls WHERE key = 'asked'" } @buffers),
	join("\n", (5) x 12), 'and that stores them');
is(lines_in_log($node, qr/out of statbuffer worker slots/), 1, 'the log has told once that there were not enough');
$node->stop;

# --- the server's slots are in use ------------------------------------------

# One slot is the launcher's and the other one a parallel worker's, for as
# long as its query sleeps.
$node = new_node('crowd',
	'max_worker_processes = 2',
	'max_logical_replication_workers = 0');
my $force = $node->pg_version >= 16 ? 'debug_parallel_query' : 'force_parallel_mode';
my $sleeper = $node->background_psql($db, on_error_stop => 0);
$sleeper->query_safe("SET $force = on; SET max_parallel_workers = 1; SET parallel_leader_participation = off");
$sleeper->query_until(qr/sleeping/, "\\echo sleeping\nSELECT pg_sleep(3600);\n");
wait_for($node, $db, q{SELECT count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'parallel worker'},
	'a slot is in use');

make_buffer($node, $db, 'crowded', q{interval '50ms', timeout '100ms'});
make_buffer($node, $db, 'crushed', q{interval '50ms', timeout '100ms'});
increment($node, $db, 'crowded', 'k', 1) for 1 .. 10;
increment($node, $db, 'crushed', 'k', 1) for 1 .. 10;
$node->wait_for_log(qr/out of background worker slots/);
pass('the log tells that there is no slot');
is(scalar(my @launchers = processes($node, 'statbuffer launcher')), 1, 'the launcher is there');

# Increments go on, and find the keys that are held.
increment($node, $db, 'crowded', 'k', 1) for 1 .. 10;
is($node->safe_psql($db, q{SELECT sb_count('k', 'crowded'), sb_count('k', 'crushed')}), '20|10', 'counts are kept');
is($node->safe_psql($db, q{SELECT sb_drain('crowded', '3 s')}), 'f', 'nothing is flushed');
is(lines_in_log($node, qr/out of background worker slots/), 1, 'the log told it once');

# The slot is free again.
$node->safe_psql($db, q{SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(3600)%' AND backend_type = 'client backend'});
wait_for_stored($node, $db, 'crowded', 20, 'a slot is free: flushes go on');
wait_for_stored($node, $db, 'crushed', 10, 'of the other buffer, too');
$sleeper->quit;
$node->stop;

# --- there is not even a slot for the launcher ------------------------------

$node = new_node('full',
	'max_worker_processes = 1',
	'max_logical_replication_workers = 0');
$sleeper = $node->background_psql($db, on_error_stop => 0);
$sleeper->query_safe("SET $force = on; SET max_parallel_workers = 1; SET parallel_leader_participation = off");
$sleeper->query_until(qr/sleeping/, "\\echo sleeping\nSELECT pg_sleep(3600);\n");
wait_for($node, $db, q{SELECT count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'parallel worker'},
	'the only slot is in use');
make_buffer($node, $db, 'alone', q{interval '50ms'});
increment($node, $db, 'alone', 'k', 1) for 1 .. 10;
is($node->safe_psql($db, q{SELECT sb_count('k', 'alone')}), '10', 'without a launcher: counts are kept');
is(lines_in_log($node, qr/could not register the statbuffer launcher/), 1, 'without a launcher: the log tells, once');

# Its slot is free again, and the launcher gets it; but there is none for a
# worker.  Once more, counts are kept.
$node->safe_psql($db, q{SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE query LIKE 'SELECT pg_sleep(3600)%' AND backend_type = 'client backend'});
wait_for($node, $db, q{SELECT count(*) = 0 FROM pg_stat_activity WHERE backend_type = 'parallel worker'},
	'the only slot is free');
$sleeper->quit;
wait_for($node, $db, q{
		WITH again AS MATERIALIZED (SELECT sb_increment('k', 0, 'alone') AS done)
		SELECT EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'statbuffer launcher') FROM again},
	'the launcher has got it, with increments that came after');
$node->wait_for_log(qr/out of background worker slots/);
is($node->safe_psql($db, q{SELECT sb_count('k', 'alone')}), '10', 'without a slot for workers: counts are kept');
is(stored($node, $db, 'alone'), '0', 'nothing is flushed');

$node->stop;
done_testing();
