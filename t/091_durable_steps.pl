# Durable buffers: processes are killed at each step of the protocol in
# doc/internals.md, exactly there (see durable_steps.c), or meet an error there, and
# afterwards each count is what the committed transactions have made it.

use strict;
use warnings;

use Config;
use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;
use TestLibrary;
use Time::HiRes qw(usleep);

plan skip_all => 'needs a compiler and the headers of the server' if !can_build_library();
plan skip_all => 'knows 64-bit ELF only' if $Config{archname} !~ /^(?:x86_64|aarch64)-linux/;

my $db = 'postgres';
my $dir = PostgreSQL::Test::Utils::tempdir;
my ($point, $reached) = ("$dir/point", "$dir/reached");
my $steps = build_library('durable_steps',
	qq{#define POINT "$point"\n#define REACHED "$reached"\n} . slurp_file("$FindBin::RealBin/durable_steps.c"));

my $node = new_node('node',
	'restart_after_crash = on',
	'max_prepared_transactions = 20',
	'autovacuum = off',
	q{statbuffer.ledger_size = '1MB'},
	"shared_preload_libraries = 'statbuffer, $steps'");

# What is counted of `hits' goes to a table, of `handled' to a handler; `once' gives
# up what fails.  All is held until it is flushed.
sql(q{
CREATE TABLE truth (buffer text, key text, n bigint);
CREATE TABLE target (key text PRIMARY KEY, n bigint NOT NULL DEFAULT 0);
SELECT sb_create('hits', 'target', 'n', 'durable=true', 'interval=1h', 'backoff=20ms');
CREATE TABLE stored (key text PRIMARY KEY, n bigint NOT NULL);
CREATE FUNCTION store(keys text[], counts bigint[]) RETURNS void LANGUAGE sql AS $$
	INSERT INTO stored AS s SELECT * FROM unnest(keys, counts)
	ON CONFLICT (key) DO UPDATE SET n = s.n + EXCLUDED.n
$$;
CREATE FUNCTION refuse(key text, count bigint) RETURNS boolean LANGUAGE sql AS 'SELECT false';
CREATE FOREIGN TABLE handled (key text NOT NULL, n bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'store', interval '1h', backoff '20ms', durable 'true');
CREATE FOREIGN TABLE once (key text NOT NULL, n bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'refuse', interval '1h', restart 'temporary', durable 'true');

-- counts, and writes the truth
CREATE FUNCTION count_up(b text, key text, n bigint) RETURNS void LANGUAGE sql AS $$
	INSERT INTO truth VALUES (b, key, n);
	SELECT sb_increment(key, n, b::regclass);
$$;
CREATE FUNCTION count_many() RETURNS void LANGUAGE sql AS $$
	INSERT INTO truth SELECT 'hits', repeat('a long one ', 150) || i, 1 FROM generate_series(1, 600) AS i;
	INSERT INTO hits SELECT repeat('a long one ', 150) || i, 1 FROM generate_series(1, 600) AS i;
$$;
});

# What each key has must be the truth.  Nobody may be between storing something and
# the buffer's knowledge of it: who stores has the table locked until then.
my $off = q{
BEGIN;
LOCK TABLE target, stored IN EXCLUSIVE MODE;
SELECT buffer, key, sum(truth), sum(stored), sum(held) FROM (
	SELECT buffer, key, n AS truth, 0 AS stored, 0 AS held FROM truth
	UNION ALL SELECT 'hits', key, 0, n, 0 FROM target
	UNION ALL SELECT 'hits', key, 0, 0, n FROM hits
	UNION ALL SELECT 'handled', key, 0, n, 0 FROM stored
	UNION ALL SELECT 'handled', key, 0, 0, n FROM handled) AS entries
GROUP BY buffer, key HAVING sum(truth) <> sum(stored) + sum(held) ORDER BY 1, 2 LIMIT 10;
COMMIT};

sub is_exact
{
	my ($what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	is(sql($off), '', "$what: each count is exact");
	return;
}

sub total
{
	my ($key) = @_;

	return sql("SELECT sb_total('$key', 'hits')");
}

# --- steps ------------------------------------------------------------------

# arm(DO, PATTERN): what is to happen to who is first at such a step.
sub arm
{
	my ($do, $pattern) = @_;

	unlink $reached;
	append_to_file("$point.new", "$do $pattern\n");
	rename "$point.new", $point or die "$point: $!";
	return;
}

# wait_for_step(WHAT): waits until somebody is there, as a test.  Returns who.
sub wait_for_step
{
	my ($what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	for (1 .. 50 * $PostgreSQL::Test::Utils::timeout_default)
	{
		if (-e $reached)
		{
			pass("$what: reached");
			return (split /\n/, slurp_file($reached))[1];
		}
		usleep(20_000);
	}
	unlink $point;
	fail("$what: reached");
	diag(sql('SELECT pid, backend_type, state, wait_event, query FROM pg_stat_activity'));
	BAIL_OUT('a step is not reached');
	return;
}

# Kills a process, and waits until the server has come back.
sub kill_process
{
	my ($pid) = @_;
	my $offset = -s $node->logfile;

	kill 'KILL', $pid or die "there is no process $pid";
	$node->wait_for_log(qr/\(PID $pid\) was terminated by signal 9/, $offset);
	$node->wait_for_log(qr/database system is ready to accept connections/, $offset);
	return;
}

# kill_at(WHAT, PATTERN, DO[, MEANWHILE]): has a session execute statements, or calls
# a function, and kills who comes to this step, after what is to happen meanwhile.
sub kill_at
{
	my ($what, $pattern, $do, $meanwhile) = @_;
	my $session;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	arm('stop', $pattern);
	if (ref $do eq 'CODE')
	{
		$do->();
	}
	else
	{
		$session = start_session($node, $db, ref $do ? @$do : $do);
	}
	my $pid = wait_for_step("$what, killed at \"$pattern\"");
	$meanwhile->() if $meanwhile;
	kill_process($pid);
	$session->{run}->finish if $session;
	return;
}

# fail_at(WHAT, PATTERN, DO): the same with an error, of which it returns what the
# session was told.
sub fail_at
{
	my ($what, $pattern, $do) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	arm('error', $pattern);
	my (undef, undef, $err) = $node->psql($db, $do);
	wait_for_step("$what, an error at \"$pattern\"");
	return $err;
}

# --- a session counts -------------------------------------------------------

my $n = 0;
foreach my $case (
	[ 'client: before heap_insert sb_ledger_[01]', 0 ],
	[ 'client: after heap_insert sb_ledger_[01]', 0 ],
	[ 'client: COMMIT', 1 ])
{
	my ($pattern, $counted) = @$case;

	$n++;
	kill_at('counting', $pattern, "SELECT count_up('hits', 'counted $n', 1)");
	is(total("counted $n"), $counted, $counted ? 'it is counted' : 'it is not counted');
}
is_exact('killed while they count');
like(fail_at('counting', 'client: before heap_insert sb_ledger_[01]', q{SELECT count_up('hits', 'failed', 1)}),
	qr/ERROR:  as if the disk was full/, 'the disk is full: the error of the transaction itself');
is(total('failed'), 0, 'which is rolled back');

# Outside of the transaction: the row survives, if WAL does, and is counted once.
# The next commit sees to WAL.
foreach my $case ([ 'before', 0 ], [ 'after', 1 ])
{
	my ($when, $counted) = @$case;

	kill_at('sb_async_increment()', "client: $when heap_insert sb_ledger_[01]", qq{SELECT sb_async_increment('async $when', 1, 'hits')},
		sub { sql('CREATE TABLE flushes_wal (); DROP TABLE flushes_wal') });
	is(total("async $when"), $counted, $counted ? 'it is counted' : 'it is not counted');
	sql("INSERT INTO truth VALUES ('hits', 'async $when', 1)") if $counted;
}
fail_at('sb_async_increment()', 'client: before heap_insert sb_ledger_[01]', q{SELECT sb_async_increment('failed', 1, 'hits')});
is(total('failed'), 0, 'an error before its row is inserted: not counted');
is_exact('outside of transactions');

# --- a worker stores --------------------------------------------------------

foreach my $buffer ('hits', 'handled')
{
	foreach my $pattern (
		'worker: before heap_insert sb_ledger_[01]',
		'worker: after heap_insert sb_ledger_[01]',
		'worker: COMMIT')
	{
		sql("SELECT count_up('$buffer', 'flushed', 1)");
		kill_at("$buffer is flushed", $pattern, "SELECT sb_flush_all('$buffer')");
		is_exact("$buffer, killed while it is flushed");
	}
	sql("SELECT count_up('$buffer', 'flushed', 1)");
	fail_at("$buffer is flushed", 'worker: before heap_insert sb_ledger_[01]', "SELECT sb_flush_all('$buffer')");
	is(sql("SELECT sb_drain('$buffer')"), 't', "$buffer is drained after an error");
	is_exact("$buffer, an error while it is flushed");
}

# What is given up is given up once, or tried again.
foreach my $pattern ('worker: before heap_insert sb_ledger_[01]', 'worker: COMMIT')
{
	kill_at('discarding', $pattern, q{SELECT sb_increment('bad', 5, 'once'); SELECT sb_flush('bad', 'once')});
	wait_for($node, $db, q{SELECT coalesce(sb_count('bad', 'once'), 0) = 0}, 'and it is discarded in the end');
}

# --- prepared transactions ----------------------------------------------------

foreach my $case (
	[ 'client: before heap_insert sb_ledger_prepared', 0 ],
	[ 'client: after heap_insert sb_ledger_prepared', 0 ],
	[ 'client: PREPARE', 1 ])
{
	my ($pattern, $prepared) = @$case;

	kill_at('PREPARE TRANSACTION', $pattern, q{BEGIN; SELECT count_up('hits', 'prepared', 1); PREPARE TRANSACTION 'p'});
	is(sql('SELECT count(*) FROM pg_prepared_xacts'), $prepared, $prepared ? 'it is prepared' : 'it is not prepared');
	is_exact('while nothing is committed');
	sql(q{COMMIT PREPARED 'p'}) if $prepared;
}
is_exact('prepared, and a crash');
fail_at('PREPARE TRANSACTION', 'client: before heap_insert sb_ledger_prepared',
	q{BEGIN; SELECT count_up('hits', 'prepared', 1); PREPARE TRANSACTION 'p'});
is(sql('SELECT count(*) FROM pg_prepared_xacts'), 0, 'after an error it is not prepared');

foreach my $pattern (
	'client: after standard_ProcessUtility',
	'keeper looking for what prepared*: after heap_getnext',
	'keeper looking for what prepared*: before simple_heap_delete',
	'keeper looking for what prepared*: after heap_insert sb_ledger_[01]',
	'keeper looking for what prepared*: after simple_heap_delete',
	'keeper looking for what prepared*: COMMIT',
	'keeper looking for what prepared*: after CommitTransactionCommand')
{
	sql(q{BEGIN; SELECT count_up('hits', 'prepared', 1), count_up('handled', 'prepared', 1); PREPARE TRANSACTION 'p'});
	kill_at('COMMIT PREPARED', $pattern, q{COMMIT PREPARED 'p'});

	# the keeper may have been there before
	sql(q{SELECT format('COMMIT PREPARED %L', gid) FROM pg_prepared_xacts \gexec});
	wait_for($node, $db, q{SELECT (SELECT sum(n) FROM truth WHERE buffer = 'hits' AND key = 'prepared') = sb_total('prepared', 'hits')},
		'it is counted after the crash');
	is_exact('COMMIT PREPARED, and a crash');
}
foreach my $pattern (
	'keeper looking for what prepared*: before heap_insert sb_ledger_[01]',
	'keeper looking for what prepared*: after simple_heap_delete')
{
	sql(q{BEGIN; SELECT count_up('hits', 'prepared', 1); PREPARE TRANSACTION 'p'});
	is(fail_at('COMMIT PREPARED', $pattern, q{COMMIT PREPARED 'p'}), '', 'nobody is told');
	wait_for($node, $db, q{SELECT (SELECT sum(n) FROM truth WHERE key = 'prepared' AND buffer = 'hits') = sb_total('prepared', 'hits')},
		'it is counted after an error');
	is_exact('COMMIT PREPARED, and an error');
}

# --- loading ------------------------------------------------------------------

foreach my $pattern (
	'keeper loading*: after heap_getnext',
	'keeper loading*: before CommitTransactionCommand',
	'keeper loading*: COMMIT',
	'keeper loading*: after CommitTransactionCommand')
{
	sql(q{SELECT count_up('hits', 'loaded ' || i, i), count_up('handled', 'loaded ' || i, i) FROM generate_series(1, 100) AS i});
	kill_at('loading', $pattern, sub { $node->stop('immediate'); $node->start });
	is_exact('killed while it loads');
}
sql(q{SELECT count_up('hits', 'loaded ' || i, i) FROM generate_series(1, 100) AS i});
$node->stop('immediate');
arm('error', 'keeper loading*: before CommitTransactionCommand');
$node->start;
wait_for_step('loading, an error');
is_exact('an error while it loads');

# --- rotation -----------------------------------------------------------------

sub ledger_files
{
	return sql(q{SELECT pg_relation_filenode('sb_ledger_0'), pg_relation_filenode('sb_ledger_1')});
}

# One of them has been emptied, and the other one has little more than the balance.
sub wait_for_rotation
{
	my ($what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	wait_for($node, $db, q{
			SELECT least(pg_relation_size('sb_ledger_0'), pg_relation_size('sb_ledger_1')) = 0
				AND greatest(pg_relation_size('sb_ledger_0'), pg_relation_size('sb_ledger_1')) < 3000000}, $what);
	return;
}

# So much that it is to be rotated, whatever it has, and is rotated once.
my @fill = ('SELECT count_many()') x 3;

foreach my $case (
	[ 'before WaitForLockers' ],
	[ 'after WaitForLockers' ],
	[ 'after heap_getnext' ],
	[ 'before heap_insert sb_ledger_[01]' ],
	[ 'after heap_insert sb_ledger_[01]' ],
	[ 'before RelationSetNewRelfile*' ],
	[ 'after RelationSetNewRelfile*' ],
	[ 'COMMIT', 1 ],
	[ 'after CommitTransactionCommand', 1 ])
{
	my ($step, $rotated) = @$case;
	my $before;

	sql(q{SELECT count_up('handled', 'rotated', 1)});
	$before = ledger_files();

	# what is counted while the ledger is rotated is not in what it adds up
	kill_at('rotation', "keeper rotating*: $step", \@fill,
		sub { sql(q{SELECT count_up('hits', 'meanwhile', 1), count_up('handled', 'meanwhile', 1)}) if $step !~ /COMMIT/ });
	my $now = ledger_files();
	isnt($now, $before, 'it is rotated') if $rotated;
	wait_for_rotation('it is rotated after the crash');
	is_exact('killed while the ledger is rotated');
}
foreach my $step ('after WaitForLockers', 'before heap_insert sb_ledger_[01]', 'after RelationSetNewRelfile*')
{
	my $offset = -s $node->logfile;

	fail_at('rotation', "keeper rotating*: $step", join ';', @fill);
	$node->wait_for_log(qr/could not keep the ledger of database \d+: as if the disk was full/, $offset) if $step =~ /WaitFor/;
	sql(q{SELECT count_up('hits', 'meanwhile', 1)});
	is_exact('an error while the ledger is rotated');
	wait_for_rotation('it is rotated in the end');
	is_exact('and after that');
}

# --- TRUNCATE, on and off -------------------------------------------------------

sql(q{SELECT count_up('hits', 'discarded', 3)});
kill_at('TRUNCATE', 'client: after simple_heap_delete', 'TRUNCATE hits');
is_exact('killed before TRUNCATE has committed');
sql(q{SELECT count_up('hits', 'discarded', 3)});
kill_at('TRUNCATE', 'client: COMMIT', 'TRUNCATE hits');
sql(q{DELETE FROM truth WHERE buffer = 'hits'; INSERT INTO truth SELECT 'hits', key, n FROM target});
is_exact('killed when it has, and nothing comes back');

# Off: what is not durable a crash may lose, but not before that is committed.
sql(q{SELECT count_up('handled', 'off', 1)});
kill_at('switching it off', 'client: after simple_heap_delete', q{ALTER FOREIGN TABLE handled OPTIONS (SET durable 'false')});
is_exact('killed before it is off');

# On: what is in memory is durable once that is committed.
is(sql(q{SELECT sb_drain('handled')}), 't', 'drained');
sql(q{ALTER FOREIGN TABLE handled OPTIONS (SET durable 'false'); SELECT count_up('handled', 'on', 2)});
fail_at('switching it on', 'client: before heap_insert sb_ledger_[01]', q{ALTER FOREIGN TABLE handled OPTIONS (SET durable 'true')});
is_exact('an error before it is on');
kill_at('switching it on', 'client: COMMIT', q{ALTER FOREIGN TABLE handled OPTIONS (SET durable 'true')});
is_exact('killed when it is on');

# --- in the end -----------------------------------------------------------------

is(sql(q{SELECT sb_drain('hits'), sb_drain('handled'), sb_drain('once')}), 't|t|t', 'all is drained');
is_exact('drained');
$node->stop('immediate');
$node->start;
is_exact('after another crash');
is(sql('SELECT (SELECT count(*) FROM hits) + (SELECT count(*) FROM handled)'), 0, 'and nothing comes back');
$node->stop;
unlike(slurp_file($node->logfile), qr/PANIC|TRAP|terminated by signal (?!9:)/, 'nobody has died but those who were killed');
done_testing();
