# Exactness under chaos: sessions count in every way there is; handlers fail,
# time out, deadlock, fail to serialize and are refused at commit; definitions,
# owners, handlers and the tables that they write to change; processes are
# cancelled and terminated; the server is restarted in the middle of it all.
# Again and again, and in the end, each key's count must be exact: see
# ChaosWorld.pm for how that is known.
#
# This is the short run.  dev/chaos runs it for as long as one likes, with
# these in the environment, each prefixed STATBUFFER_CHAOS_:
#
#	SECONDS		how long
#	SEED		which chaos; brings the same again, if not in the same order
#	PRELOAD		yes or no, or nothing: as it comes at each restart
#	RESTARTS	no, if the server is to be left running
#	RATE		how many transactions a second sessions begin that are left
#				alone; 0 for as many as they can
#	REPORT		a file to write the figures to

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin, "$FindBin::RealBin/..";

use ChaosActions;
use ChaosEvents;
use ChaosLoad;
use ChaosServer;
use ChaosWorld;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;
use Time::HiRes qw(time usleep);

sub parameter
{
	my ($name, $default) = @_;
	my $value = $ENV{"STATBUFFER_CHAOS_$name"};

	return defined $value && $value ne '' ? $value : $default;
}

my $seconds = parameter('SECONDS', 40);
$seed = parameter('SEED', int time);
$preload = parameter('PRELOAD', '');
my $restarts = parameter('RESTARTS', 'yes') ne 'no';
$rate = parameter('RATE', 300);
my $report = parameter('REPORT', '');

srand $seed;
note("$seconds seconds, STATBUFFER_CHAOS_SEED=$seed");

# pg_ctl's: handlers may need their time
$ENV{PGCTLTIMEOUT} = 300;

$node = PostgreSQL::Test::Cluster->new('chaos');
$node->init;
$node->append_conf(
	'postgresql.conf', q{
max_connections = 50
max_worker_processes = 16
shared_buffers = 128MB
max_wal_size = 4GB
deadlock_timeout = 100ms
log_lock_waits = on
log_statement = none
log_min_messages = warning
log_min_error_statement = panic
log_line_prefix = '%m [%p] %b %q%a '
include 'chaos.conf'
});
use_node($node);
open_diary();

# --- the reckoning ----------------------------------------------------------

my $keys_off = 0;

# What was stored other than the statistics say, in each life of the server.
my %stored_besides;

# Compares each key, while everything goes on.
sub reckon
{
	my ($when) = @_;
	my ($status, $out, $err);

	# who waits for all these locks may be found in a deadlock
	foreach my $attempt (1 .. 10)
	{
		($status, $out, $err) = $node->psql('postgres', balance_sql(),
			extra_params => ['--single-transaction'], on_error_stop => 1);
		last if $status == 0 || $err !~ /deadlock detected/;
		record('deadlock at the reckoning');
	}
	if ($status != 0)
	{
		record(sql('SELECT pid, backend_type, pg_blocking_pids(pid), state, wait_event, query FROM pg_stat_activity'));
		die "cannot reckon: $err";
	}

	# what was stored when the server started is not in its statistics
	my @lines = split /\n/, $out;
	my $besides = join "\n", grep { /^=/ } @lines;
	my @off = grep { !/^=/ } @lines;

	$stored_besides{$lives} //= $besides;
	$done{reckonings}++;
	read_log();
	record("reckoning $when: "
		  . (@off ? 'OFF' : $besides ne $stored_besides{$lives} ? 'statistics are off' : 'exact'));
	record("  $_") foreach @off;
	$keys_off += @off;
	$#off = 19 if @off > 20;
	is(join("\n", @off),
		'', "$when, each key has what the ledger says, to the last one");
	is($besides, $stored_besides{$lives}, 'and the statistics agree')
	  if $besides ne $stored_besides{$lives};
	return;
}

# Statistics are of one life of the server.
sub add_statistics
{
	foreach my $row (split /\n/,
		sql('SELECT buffer, increments, flushed_keys, handler_calls, failures, discarded FROM sb_stat_buffers'))
	{
		my ($buffer, $increments, $keys, $calls, $failures, $discarded) =
		  split /\|/, $row;

		$done{'keys stored'} += $keys;
		$done{'calls of handlers'} += $calls;
		$done{'failures of keys and buffers'} += $failures;
	}
	return;
}

# --- restarts ---------------------------------------------------------------

sub restart_server
{
	my ($how, $stop) = random_stop();

	add_statistics();
	record("stop: $how");
	$stop->();
	record('stopped');
	$done{"restarts: $how"}++;
	$done{restarts}++;
	finish_load(0);
	finish_struck();
	rotate_log();
	start_server();

	# at once, before anything was loaded or counted
	if (rand() < 0.2)
	{
		record('stop again');
		complete_stop('fast');
		$done{'restarts: at once after a start'}++;
		$done{restarts}++;
		start_server();
	}
	reckon('after a restart') if int rand 2;
	return;
}

# --- peace ------------------------------------------------------------------

# All that goes wrong ends, and all that is held is stored.
sub make_peace
{
	reckon('before the peace');

	undo_due(1);
	sql('UPDATE mood SET failing = 0, slow = 0, stuck = false');
	foreach my $role (@owners[ 1 .. $#owners ])
	{
		sql("ALTER ROLE $role RESET ALL");
	}
	strike('workers terminated', 'pg_terminate_backend', $is_worker, 100);

	foreach my $buffer (@exact_buffers, 'once')
	{
		is(sql("SELECT sb_drain('$buffer', '180s')"), 't', "$buffer is drained");
	}
	# As long as keys of one type are held, those of the other cannot be stored.
	my $drained = 'f';
	foreach my $attempt (1 .. 60)
	{
		insist('key columns altered',
			'ALTER FOREIGN TABLE shifty ALTER key TYPE ' . ($attempt % 2 ? 'int' : 'bigint'));
		$drained = sql("SELECT sb_drain('shifty', '3s')");
		last if $drained eq 't';
	}
	is($drained, 't', 'shifty is drained of its keys of either type');
	is(sql('SELECT count(*) FROM held'), '0', 'nothing is held after the drains');
	reckon('in the end');
	is( sql(
			"SELECT coalesce(key, 'none'), b.n, s.n FROM (SELECT * FROM books WHERE buffer = 'shifty') b
			 FULL JOIN (SELECT * FROM stored WHERE buffer = 'shifty') s USING (key)
			 WHERE b.n IS DISTINCT FROM s.n"),
		'',
		'so have the keys whose type was altered');
	is( sql("SELECT count(*) FROM stored WHERE key = 'undone' AND buffer = 'hot'"),
		'0', 'nothing that was rolled back is stored');

	is( sql(
			"SELECT buffer, state, last_error FROM sb_stat_buffers
			 WHERE state NOT IN ('running', 'idle') AND buffer <> 'fleeting'"),
		'',
		'no buffer fails any more');
	is( sql(
			"SELECT count(*) FROM sb_keys('wide') WHERE failures > 0 OR last_error IS NOT NULL"
		),
		'0',
		'nor does any key');

	# It counts as ever.
	sql("SELECT sb_increment(k, 1, 'wide') FROM generate_series(1, 100) AS k");
	is(sql("SELECT sb_drain('wide', '180s')"), 't', 'counting goes on');
	return;
}

# --- the story --------------------------------------------------------------

start_server();
sql(world_sql());
sql(q{
	CREATE DATABASE template_chaos;
	\c template_chaos
	CREATE EXTENSION statbuffer;
	CREATE FUNCTION store_fleeting(key int, count bigint) RETURNS void LANGUAGE sql AS '';
	CREATE FOREIGN TABLE fleeting (key int NOT NULL, n bigint NOT NULL)
	SERVER statbuffer OPTIONS (handler 'store_fleeting', interval '2s')});
$done{$_} = 0
  foreach ('workers terminated', 'workers cancelled', 'launchers terminated',
	'launchers cancelled', 'sessions terminated', 'sessions cancelled',
	'struck while the server stopped', 'keys stored', 'events', 'reckonings', 'restarts',
	'deadlocks in workers');

my $end = time + $seconds;
my $strike_launcher = time + 5;
my $next_restart = time + 5 + rand 10;
my $next_reckoning = time + 3;
my $next_note = time + 10;

begin_load($end - time);
while (time < $end && !$keys_off)
{
	start_struck();
	undo_due();
	cause_event();

	# It comes back after five seconds, and flushes go on for some more.
	if (time >= $strike_launcher)
	{
		strike('launchers terminated', 'pg_terminate_backend', $is_launcher);
		$strike_launcher = time + 10 + rand 20;
	}
	if (time >= $next_reckoning)
	{
		reckon(sprintf 'after %d s', time - $started);
		$next_reckoning = time + 2 + rand 8;
	}
	if ($restarts && !$keys_off && time >= $next_restart && time < $end - 3)
	{
		restart_server();
		last if $keys_off;
		begin_load($end - time);
		$next_restart = time + 5 + rand 20;
	}
	if (time >= $next_note)
	{
		record("so far: $done{reckonings} reckonings, $done{restarts} restarts,"
			  . " $keys_off keys off");
		$next_note = time + 10;
	}
	usleep(50_000);
}

# --- peace, and the reckoning -----------------------------------------------

record('peace');
finish_load(!$keys_off);
sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE $is_session");
finish_struck();
$node->poll_query_until('postgres',
	"SELECT count(*) FROM pg_stat_activity WHERE $is_session", '0')
  or die 'sessions do not end';
add_statistics();

# What is off is looked at as it is.
make_peace() if !$keys_off;

read_log();
is(join("\n", @crashes), '', 'the server never crashed');
is(join("\n", @complaints), '', 'neither the launcher nor a worker met an error of its own');

# What the chaos was like
my ($sum, $entries, $keys) = split /\|/,
  sql('SELECT sum(n), sum(entries), count(*) FROM books');
my ($attempts, $doubtful) = split /\|/, sql(doubtful_sql());
my %failures = map { $_ => sql(
		"SELECT coalesce(pg_sequence_last_value('failed_$_'), 0)") }
  @failure_kinds;
my @figures = (
	[ 'seconds', int(time - $started) ],
	[ 'seed', $seed ],
	[ 'transactions of sessions that were left alone', $transactions ],
	[ 'increments reconciled', $entries ],
	[ 'which add up to', $sum ],
	[ 'in so many keys', $keys ],
	[ 'asynchronous increments reconciled', $attempts ],
	[ '  sessions cut off in the middle of one', $doubtful ],
	[ 'keys off', $keys_off ],
	(map { [ $_, $done{$_} ] } sort keys %done),
	(map { [ "handlers failed: $_", $failures{$_} ] } @failure_kinds));
my $table = join '', map { sprintf "%-52s %s\n", @$_ } @figures;

note($_) foreach split /\n/, $table;
append_to_file($report, $table) if $report;

# and was it one?  On a slow machine there is not everything in a short time.
if (!$keys_off)
{
	cmp_ok($entries, '>', 0, 'there were increments');
	cmp_ok($done{'keys stored'}, '>', 0, 'there was something stored');
	cmp_ok($done{events}, '>', 0, 'there were events');
}
if (!$keys_off && $done{events} >= 500)
{
	foreach my $what (
		'workers terminated', 'workers cancelled', 'launchers terminated',
		'sessions cancelled', 'sessions terminated', $restarts ? 'restarts' : ())
	{
		cmp_ok($done{$what}, '>', 0, "there were $what");
	}
	foreach my $kind (@failure_kinds)
	{
		cmp_ok($failures{$kind}, '>', 0,
			"there were handlers that failed: $kind");
	}
}

$node->stop('fast');

done_testing();
