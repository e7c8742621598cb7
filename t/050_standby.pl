# Where counts can be made, and where not: in transactions that are prepared,
# in parallel plans, on standbys; and what becomes of them when a standby is
# promoted, or the standby is missed by the one that waits for it.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $db = 'postgres';

my $primary = PostgreSQL::Test::Cluster->new('primary');
$primary->init(allows_streaming => 1);
$primary->append_conf('postgresql.conf', qq{
shared_preload_libraries = 'statbuffer'
max_worker_processes = 16
max_connections = 30
max_prepared_transactions = 5
log_line_prefix = '%m [%p] %b %q%a '
});
$primary->start;
$primary->backup('backup');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($primary, 'backup', has_streaming => 1);
$standby->start;

# A standby of the standby, and one whose server does not know of us yet.
$standby->backup('backup');
my $cascade = PostgreSQL::Test::Cluster->new('cascade');
$cascade->init_from_backup($standby, 'backup', has_streaming => 1);
$cascade->start;
my $plain = PostgreSQL::Test::Cluster->new('plain');
$plain->init_from_backup($primary, 'backup', has_streaming => 1);
$plain->adjust_conf('postgresql.conf', 'shared_preload_libraries', q{''});
$plain->start;

$primary->safe_psql($db, 'CREATE EXTENSION statbuffer');

# --- prepared transactions --------------------------------------------------

make_buffer($primary, $db, 'twophase', q{interval '1h', timeout '1h'});
increment($primary, $db, 'twophase', 'k', 1);
is($primary->safe_psql($db, q{SELECT sb_drain('twophase')}), 't', 'a worker is there');
$primary->safe_psql($db, 'TRUNCATE twophase_calls');

# What a transaction has counted cannot be prepared; what was undone before does
# not matter, nor does what was counted outside of it.
for my $statements (
	q{SELECT sb_increment('k', 1, 'twophase')},
	q{INSERT INTO twophase VALUES ('k', 1)},
	q{SAVEPOINT s; SELECT sb_increment('k', 1, 'twophase'); RELEASE s},
	q{SELECT sb_increment('k', 1, 'twophase'); SELECT sb_increment('k', -1, 'twophase')})
{
	my ($result, $stdout, $stderr) = $primary->psql($db,
		"\\set VERBOSITY verbose\nBEGIN; $statements; PREPARE TRANSACTION 'counting'");

	like($stderr, qr/ERROR:  0A000: cannot PREPARE .*\n(?:DETAIL:  .*\n)?HINT:  .*sb_async_increment/, "PREPARE TRANSACTION is refused, with a hint, after: $statements");
}
is($primary->safe_psql($db, q{SELECT coalesce(sb_count('k', 'twophase'), 0), (SELECT count(*) FROM pg_prepared_xacts)}), '0|0',
	'it was rolled back');
for my $end ('COMMIT', 'ROLLBACK')
{
	$primary->safe_psql($db, qq{
		BEGIN;
		SELECT sb_async_increment('k', 10, 'twophase'), sb_count('k', 'twophase');
		SAVEPOINT s;
		SELECT sb_increment('k', 1000, 'twophase');
		ROLLBACK TO s;
		INSERT INTO twophase_bad VALUES ('$end');
		PREPARE TRANSACTION 'counting'});
	pass("$end PREPARED: asynchronous increments, and those that were undone, can be prepared");
	increment($primary, $db, 'twophase', 'k', 1);
	is($primary->safe_psql($db, q{SELECT sb_count('k', 'twophase'), sb_drain('twophase')}), '11|t', "$end PREPARED: they are counted at once");
	$primary->safe_psql($db, "$end PREPARED 'counting'");
}
is(stored($primary, $db, 'twophase'), '22', 'and stay, whatever becomes of the transaction');

# A prepared transaction has altered the buffer: that takes effect when it is
# committed, and not before.  A worker sleeps that knows the old interval.
my $worker = $primary->safe_psql($db, q{SELECT pid FROM sb_stat_buffers WHERE buffer = 'twophase'});
like($worker, qr/^\d+$/, 'a worker sleeps');
increment($primary, $db, 'twophase', 'k', 100);
for my $end ('ROLLBACK', 'COMMIT')
{
	$primary->safe_psql($db, qq{
		BEGIN;
		ALTER FOREIGN TABLE twophase OPTIONS (SET interval '10ms');
		PREPARE TRANSACTION 'altering';
		$end PREPARED 'altering'});
	is(stored($primary, $db, 'twophase'), '22', 'an alteration that was rolled back has no effect') if $end eq 'ROLLBACK';
	is($primary->safe_psql($db, q{SELECT sb_count('k', 'twophase')}), '100', 'and the count waits') if $end eq 'ROLLBACK';
}
wait_for_stored($primary, $db, 'twophase', 122, 'one that was committed is noticed by the worker');
is($primary->safe_psql($db, q{SELECT pid FROM sb_stat_buffers WHERE buffer = 'twophase'}), $worker, 'the same one');

# One that is still prepared keeps the buffer locked, over a restart as well.
# The server stops all the same; what is held meanwhile is stored then.
$primary->safe_psql($db, q{
	ALTER FOREIGN TABLE twophase OPTIONS (SET interval '1h');
	SELECT sb_increment('k', 1000, 'twophase');
	BEGIN;
	ALTER FOREIGN TABLE twophase OPTIONS (SET interval '10ms');
	PREPARE TRANSACTION 'altering'});
$primary->restart;
my ($result, $stdout, $stderr) = $primary->psql($db, q{SET lock_timeout = '100ms'; SELECT sb_increment('k', 1, 'twophase')});
like($stderr, qr/canceling statement due to lock timeout/, 'a buffer that a prepared transaction has altered is locked');
$primary->safe_psql($db, q{COMMIT PREPARED 'altering'});
increment($primary, $db, 'twophase', 'another', 1);
wait_for_stored($primary, $db, 'twophase', 1123, 'after a restart, and when it is committed, what was held is stored');

# The same for one that drops it: its worker leaves.
increment($primary, $db, 'twophase', 'k', 1);
is($primary->safe_psql($db, q{SELECT sb_drain('twophase')}), 't', 'a worker is there again');
$worker = $primary->safe_psql($db, q{SELECT pid FROM sb_stat_buffers WHERE buffer = 'twophase'});
$primary->safe_psql($db, q{
	BEGIN;
	DROP FOREIGN TABLE twophase;
	PREPARE TRANSACTION 'dropping';
	COMMIT PREPARED 'dropping'});
wait_for($primary, $db, "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = $worker", 'the worker of a buffer that a prepared transaction has dropped leaves');

# --- parallel plans ---------------------------------------------------------

# A table that is big enough for several processes, and settings that have them
# read it whenever they may.
my $force = $primary->pg_version >= 16 ? 'debug_parallel_query' : 'force_parallel_mode';
my $parallel = qq{
	SET $force = on;
	SET parallel_setup_cost = 0;
	SET parallel_tuple_cost = 0;
	SET min_parallel_table_scan_size = 0;
	SET max_parallel_workers_per_gather = 3;
};
make_buffer($primary, $db, 'parallel', q{interval '1h'});
$primary->safe_psql($db, q{
	CREATE TABLE big AS SELECT i, 'k' || i % 10 AS key FROM generate_series(1, 100000) i;
	ALTER TABLE big SET (parallel_workers = 3);
	ANALYZE big;

	-- What may be in a parallel plan stays in the leader; and this one says
	-- that it could run anywhere.
	CREATE FUNCTION careful(key text) RETURNS int LANGUAGE plpgsql PARALLEL RESTRICTED
	AS $$ BEGIN PERFORM sb_increment(key, 1, 'parallel'); RETURN 1; END $$;
	CREATE FUNCTION careless(key text) RETURNS int LANGUAGE plpgsql PARALLEL SAFE
	AS $$ BEGIN PERFORM sb_increment(key, 1, 'parallel'); RETURN 1; END $$;
	CREATE FUNCTION careless_count(key text) RETURNS bigint LANGUAGE plpgsql PARALLEL SAFE
	AS $$ BEGIN RETURN sb_count(key, 'parallel'); END $$;
});
is($primary->safe_psql($db, q{
		SELECT string_agg(DISTINCT proname, ' ' ORDER BY proname) FROM pg_proc
		WHERE proname LIKE 'sb\_%' AND proname NOT LIKE 'sb\_ledger\_body\_%' AND proparallel = 's'}),
	'', 'none of the functions is parallel safe');
is($primary->safe_psql($db, q{
		SELECT string_agg(DISTINCT proname, ' ' ORDER BY proname) FROM pg_proc
		WHERE proname IN ('sb_increment', 'sb_count', 'sb_keys', 'sb_drain', 'sb_flush', 'sb_flush_all') AND proparallel <> 'r'}),
	'', 'those that count and look are parallel restricted');

my $sum = 0;
for my $query (
	q{SELECT count(*) FROM (SELECT sb_increment(key, 1, 'parallel') FROM big OFFSET 0) x},
	q{SELECT sum(careful(key)) FROM big},
	q{CREATE TABLE counted AS SELECT sb_increment(key, 1, 'parallel')::text FROM big},
	q{INSERT INTO parallel SELECT key, 1 FROM big},
	q{SELECT count(*) FROM (SELECT sb_increment(max(key), 100000, 'parallel') FROM big) x})
{
	my $plan = $primary->safe_psql($db, "$parallel EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, SUMMARY OFF) $query");

	$plan =~ /^INSERT|Insert on/m
	  or like($plan, qr/Workers Launched: [1-9]/, "in a parallel plan: $query");
	$sum += 100000;
	is($primary->safe_psql($db, 'SELECT sum(count) FROM parallel'), $sum, 'is counted exactly');
}
is($primary->safe_psql($db, q{SELECT count(*), min(count), max(count) FROM parallel}), '10|40000|140000', 'key by key');

# What is written outside of the transaction may have to be in the ledger.
unlike($primary->safe_psql($db, "$parallel EXPLAIN (COSTS OFF) SELECT count(*) FROM (SELECT sb_async_increment(key, 1, 'parallel') FROM big OFFSET 0) x"),
	qr/Workers/, 'sb_async_increment() makes no plan parallel');
for my $query ('SELECT sum(careless(key)) FROM big', 'SELECT sum(careless_count(key)) FROM big')
{
	($result, $stdout, $stderr) = $primary->psql($db, "$parallel $query");
	like($stderr, qr/ERROR:  cannot use a buffer in a parallel worker\nHINT:  .*PARALLEL RESTRICTED/, "an error, with a hint, and not a wrong count: $query");
}
is($primary->safe_psql($db, 'SELECT sum(count) FROM parallel'), $sum, 'nothing of it is counted');
is($primary->safe_psql($db, q{SELECT sb_drain('parallel')}), 't', 'drained');
is(stored($primary, $db, 'parallel'), $sum, 'stored');
$primary->safe_psql($db, 'DROP TABLE big, counted; DROP FOREIGN TABLE parallel');

# --- standbys ---------------------------------------------------------------

# One buffer flushes, another one holds a count all the time.
make_buffer($primary, $db, 'hits', q{interval '50ms'});
make_buffer($primary, $db, 'held', q{interval '1h'});
increment($primary, $db, 'hits', 'k', 3);
increment($primary, $db, 'held', 'k', 4);
wait_for_stored($primary, $db, 'hits', 3, 'the primary flushes');

# The cascading standby follows the standby.
sub catch_up
{
	my ($from, @to) = @_;
	my $where = $from->safe_psql($db, 'SELECT pg_is_in_recovery()') eq 't' ? 'replay' : 'insert';

	foreach my $to (@to)
	{
		wait_for($from, $db, sprintf(q{SELECT count(*) = 1 FROM pg_stat_replication WHERE application_name = '%s'}, $to->name),
			$to->name . ' follows');
		$from->wait_for_catchup($to, 'replay', $from->lsn($where));
	}
	return;
}

catch_up($primary, $standby, $plain);
catch_up($standby, $cascade);
for my $node ($standby, $cascade, $plain)
{
	my $name = $node->name;

	# What was stored is replicated; what is held is in the primary's memory.
	is(stored($node, $db, 'hits'), '3', "$name: what the primary stored is there");
	is($node->safe_psql($db, q{SELECT sb_count('k', 'held') IS NULL}), 't', "$name: what it holds is not");
	is($node->safe_psql($db, 'SELECT count(*) FROM held'), '0', "$name: nor for SELECT");
	is($node->safe_psql($db, q{SELECT count(*) FROM sb_keys('held')}), '0', "$name: nor by name");
	is($node->safe_psql($db, 'SELECT count(*), sum(keys) FROM sb_stat_buffers'), '2|0', "$name: nor in the view");

	# Each statement that looks says so, once.
	my $log_offset = -s $node->logfile;
	for my $query (
		'SELECT * FROM held, held AS other',
		q{SELECT sb_count('k', 'held') FROM generate_series(1, 3)},
		q{SELECT * FROM sb_keys('held')},
		'SELECT * FROM sb_stat_buffers',
		'SELECT * FROM sb_stat_memory')
	{
		(undef, undef, $stderr) = $node->psql($db, $query);
		is(() = $stderr =~ /WARNING:  a standby does not have the counts .*\nHINT:  Connect to the primary/g, 1,
			"$name: a warning: $query");
		(undef, undef, $stderr) = $node->psql($db, "$query;\n$query;");
		is(() = $stderr =~ /WARNING:  a standby/g, 2, "$name: for each statement: $query");
	}
	unlike(slurp_file($node->logfile, $log_offset), qr/a standby does not have/, "$name: not in the log");

	for my $case (
		[ 'sb_increment()', q{SELECT sb_increment('k', 1, 'hits')} ],
		[ 'sb_async_increment()', q{SELECT sb_async_increment('k', 1, 'hits')} ],
		[ 'INSERT', q{INSERT INTO hits VALUES ('k', 1)} ],
		[ 'COPY', qq{COPY hits FROM stdin;\nk\t1\n\\.\n} ],
		[ 'TRUNCATE', q{TRUNCATE hits} ])
	{
		my ($what, $query) = @$case;

		($result, $stdout, $stderr) = $node->psql($db, "\\set VERBOSITY verbose\n$query");
		isnt($result, 0, "$name: $what fails");
		like($stderr, qr/ERROR:  25006: /, "$name: $what is an error of a read-only transaction");
	}
	for my $function (qw(sb_increment sb_async_increment))
	{
		($result, $stdout, $stderr) = $node->psql($db, "SELECT $function('k', 1, 'hits')");
		like($stderr, qr/ERROR:  .*(recovery|standby).*\nHINT:  /, "$name: $function() says why, and hints at what to do");
	}
	for my $call (q{sb_start('hits')}, q{sb_stop('hits')}, q{sb_flush('k', 'hits')}, q{sb_flush_all('hits')}, q{sb_drain('hits')}, 'sb_start()')
	{
		($result, $stdout, $stderr) = $node->psql($db, "SELECT $call");
		like($stderr, qr/ERROR:  .*recovery/, "$name: $call fails");
	}

	# Who catches the error can go on.
	is($node->safe_psql($db, q{
			DO $$
			BEGIN
				PERFORM sb_increment('k', 1, 'hits');
			EXCEPTION WHEN read_only_sql_transaction THEN
				RAISE LOG 'not here';
			END
			$$;
			SELECT sb_count('k', 'hits') IS NULL}),
		't', "$name: nothing was counted");
	is($node->safe_psql($db, q{SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'statbuffer%'}),
		'0', "$name: there is no process for what it cannot do");
}

# --- promoted ---------------------------------------------------------------

# Sessions that have tried before go on: one after the other transaction, and
# one in the middle of it.  That one stays read-only, and may count.
my %session;
for my $node ($standby, $plain)
{
	my $session = $session{ $node->name } = { next => $node->background_psql($db, on_error_stop => 0),
		open => $node->background_psql($db, on_error_stop => 0) };
	$session->{$_}->query_safe(q{SET client_min_messages = error}) for qw(next open);

	$session->{next}->query(q{SELECT sb_increment('k', 1, 'hits')});
	$session->{open}->query_safe(q{BEGIN; SELECT count(*) FROM hits; SAVEPOINT s});
	$session->{open}->query(q{SELECT sb_increment('k', 1, 'hits')});
	$session->{open}->query('ROLLBACK TO s');
}

sub test_promoted
{
	my ($node) = @_;
	my $name = $node->name;
	my $session = $session{$name};

	$node->promote;
	wait_for($node, $db, 'SELECT NOT pg_is_in_recovery()', "$name: promoted");
	if ($node->safe_psql($db, 'SHOW shared_preload_libraries') eq 'statbuffer')
	{
		wait_for($node, $db, q{SELECT count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'statbuffer launcher'},
			"$name: the launcher starts");
	}
	else
	{
		is($node->safe_psql($db, q{SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'statbuffer%'}),
			'0', "$name: nothing starts before it is needed");
	}
	is($session->{open}->query(q{SHOW transaction_read_only}), 'on', "$name: a transaction is still of the standby");
	$session->{open}->query(q{SELECT sb_increment('k', 1000, 'hits')});
	is($session->{open}->query(q{SELECT sb_count('k', 'hits')}), '1000', "$name: it counts");
	increment($node, $db, 'hits', 'k', 10);
	$session->{next}->query(q{SELECT sb_increment('k', 100, 'hits')});
	wait_for_stored($node, $db, 'hits', 113, "$name: increments are flushed");
	$session->{open}->query('COMMIT');
	wait_for_stored($node, $db, 'hits', 1113, "$name: those of the open transaction as well");
	$_->quit for values %$session;
	is($node->safe_psql($db, q{SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'statbuffer launcher'}),
		'1', "$name: there is one launcher");

	increment($node, $db, 'held', 'k', 40);
	is($node->safe_psql($db, q{SELECT sb_count('k', 'held')}), '40', "$name: its counts are its own");
	is($node->safe_psql($db, q{SELECT sb_drain('held')}), 't', "$name: drained");
	is(stored($node, $db, 'held'), '40', "$name: stored");
	return;
}

test_promoted($plain);
$plain->restart;
increment($plain, $db, 'hits', 'k', 1);
wait_for_stored($plain, $db, 'hits', 1114, 'plain: it counts after a restart');
$plain->stop;

test_promoted($standby);

# Who follows the promoted one goes on doing that, and is none itself.
catch_up($standby, $cascade);
is(stored($cascade, $db, 'hits'), '1113', 'cascade: what the promoted one stores is there');
($result, $stdout, $stderr) = $cascade->psql($db, q{SELECT sb_increment('k', 1, 'hits')});
like($stderr, qr/ERROR:  cannot increment during recovery/, 'cascade: it does not count');
is($cascade->safe_psql($db, q{SELECT count(*) FROM pg_stat_activity WHERE backend_type LIKE 'statbuffer%'}),
	'0', 'cascade: there is no process');

# The former primary did not notice.
is($primary->safe_psql($db, q{SELECT sb_drain('held')}), 't', 'the former primary goes on');
is(stored($primary, $db, 'held'), '4', 'and has stored its own');
$primary->stop;

# --- switching over ---------------------------------------------------------

# The one that was promoted is stopped, and its standby takes its place: what
# was held is stored by the last flush, and received before the server is down.
increment($standby, $db, 'held', 'k', 500);
increment($standby, $db, 'hits', 'bad', 7);
make_buffer($standby, $db, 'failing', q{interval '1h'});
$standby->safe_psql($db, q{INSERT INTO failing_bad VALUES ('bad'); SELECT sb_increment('bad', 6, 'failing')});
$standby->stop('fast');
$cascade->promote;
wait_for($cascade, $db, 'SELECT NOT pg_is_in_recovery()', 'cascade: promoted');
is(stored($cascade, $db, 'held'), '540', 'cascade: what the other one held when it was stopped is stored');
is(stored($cascade, $db, 'hits'), '1120', 'cascade: all of it');
is($cascade->safe_psql($db, q{SELECT sb_count('k', 'held') IS NULL, (SELECT count(*) FROM failing)}), 't|0', 'cascade: nothing of it is held');
increment($cascade, $db, 'held', 'k', 60);
is($cascade->safe_psql($db, q{SELECT sb_drain('held')}), 't', 'cascade: drained');
is(stored($cascade, $db, 'held'), '600', 'cascade: it counts');

# What could not be stored is with the one that was stopped.  As a standby of
# the new one it leaves that where it is.
$standby->enable_streaming($cascade);
$standby->start;
catch_up($cascade, $standby);
is($standby->safe_psql($db, q{SELECT (SELECT sum(counter) FROM held_calls), sb_count('bad', 'failing') IS NULL}), '600|t',
	'back as a standby, it has what the other one stored, and counts nothing');
ok(-e $standby->data_dir . '/statbuffer.saved', 'what it could not store is still saved');

# --- a standby that is waited for -------------------------------------------

# Commits wait for a standby that is not there any more: the worker's, too.
# Increments do not commit anything that would wait.
$cascade->safe_psql($db, q{
	ALTER FOREIGN TABLE hits OPTIONS (ADD shutdown '1s');
	ALTER SYSTEM SET synchronous_standby_names = 'standby';
	SELECT pg_reload_conf();
	SELECT sb_drain('hits')});
$standby->stop;
my $before = stored($cascade, $db, 'hits');
increment($cascade, $db, 'hits', 'waits', 1) for 1 .. 3;
wait_for($cascade, $db, q{SELECT count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'statbuffer worker' AND wait_event = 'SyncRep'},
	'a flush waits for the standby');
increment($cascade, $db, 'hits', 'waits', 1) for 1 .. 3;
is($cascade->safe_psql($db, q{SELECT sb_count('waits', 'hits')}), '6', 'increments do not, and all is held');
is(stored($cascade, $db, 'hits'), $before, 'nothing is stored yet');

# It is cancelled there, and terminated: what waited is committed, once.
$worker = $cascade->safe_psql($db, q{SELECT pid FROM sb_stat_buffers WHERE buffer = 'hits'});
$cascade->safe_psql($db, "SELECT pg_cancel_backend($worker)");
wait_for($cascade, $db, q{SELECT sb_count('waits', 'hits') < 6}, 'a cancel ends the wait, and the commit is good');
wait_for($cascade, $db, q{SELECT count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'statbuffer worker' AND wait_event = 'SyncRep'},
	'the next flush waits');
$cascade->safe_psql($db, "SELECT pg_terminate_backend($worker)");
wait_for($cascade, $db, "SELECT count(*) = 0 FROM pg_stat_activity WHERE pid = $worker", 'a termination ends it, too');
increment($cascade, $db, 'hits', 'waits', 1);
wait_for($cascade, $db, q{SELECT count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'statbuffer worker' AND wait_event = 'SyncRep'},
	'and the next flush waits');
is($cascade->safe_psql($db, q{SELECT sum(counter) + sb_count('waits', 'hits') FROM hits_calls}), $before + 7, 'nothing is stored twice');

# So does a shutdown.
{
	local $ENV{PGCTLTIMEOUT} = 60;

	ok($cascade->stop('fast', fail_ok => 1), 'the server stops without the standby')
	  or $cascade->stop('immediate');
}
$cascade->append_conf('postgresql.auto.conf', q{synchronous_standby_names = ''});
$cascade->start;
increment($cascade, $db, 'hits', 'after', 1);
wait_for_stored($cascade, $db, 'hits', $before + 8, 'everything is stored, once');

has_not_crashed($_, 'no process has crashed: ' . $_->name)
  for $primary, $standby, $cascade, $plain;
$cascade->stop;
done_testing();
