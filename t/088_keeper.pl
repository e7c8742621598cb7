# The process that keeps the ledger of durable buffers: it comes when it is
# wanted, leaves, and makes way; it rotates the ledger under load; it loads what
# the copy of a database has; and it may be killed in the middle of anything.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;
use Time::HiRes qw(usleep);

my $db = 'postgres';
my $node = new_node('node',
	'restart_after_crash = on',
	'max_prepared_transactions = 20',
	'autovacuum = off',
	'wal_level = replica',
	'max_wal_senders = 2',
	q{statbuffer.ledger_size = '1MB'},
	q{shared_preload_libraries = 'statbuffer'});
my $ledgers = q{pg_relation_size('sb_ledger_0') + pg_relation_size('sb_ledger_1')};

# The same transactions write the truth, one row for each client.
sql(q{
	CREATE TABLE hits_target (key text PRIMARY KEY, n bigint NOT NULL DEFAULT 0);
	CREATE TABLE held_target (LIKE hits_target INCLUDING ALL);
	CREATE TABLE truth (client int, n bigint);
	INSERT INTO truth SELECT i, 0 FROM generate_series(0, 9) AS i;
	SELECT sb_create('hits', 'hits_target', 'n', 'durable=true', 'interval=200ms');
	SELECT sb_create('held', 'held_target', 'n', 'durable=true', 'interval=1h')});
my $script = q{
\set k random(1, 500)
BEGIN;
INSERT INTO hits VALUES ('a key that is long enough to fill the ledger soon ' || :k, 1);
INSERT INTO held VALUES ('another key that is long enough to fill the ledger ' || :k, 1);
UPDATE truth SET n = n + 1 WHERE client = :client_id;
COMMIT;
};

# A client that got an error has counted neither.
sub balances
{
	my ($what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	is(sql(q{SELECT sb_drain('hits'), sb_drain('held')}), 't|t', "$what: everything is stored");
	is(sql(q{
			SELECT (SELECT sum(n) FROM hits_target) - t, (SELECT sum(n) FROM held_target) - t
			FROM (SELECT sum(n) AS t FROM truth) AS s}), '0|0', "$what: once");
	return;
}

sub keeper
{
	my ($doing) = @_;

	return sql(qq{
		SELECT pid FROM pg_stat_activity
		WHERE backend_type = 'statbuffer worker' AND datname = '$db' AND query ~ '$doing'});
}

sub wait_for_keeper
{
	my ($doing, $condition, $what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	wait_for($node, $db, qq{
			SELECT count(*) = 1 FROM pg_stat_activity a
			WHERE backend_type = 'statbuffer worker' AND datname = '$db' AND query ~ '$doing' AND ($condition)}, $what);
	return keeper($doing);
}

sub kill_keeper
{
	my ($pid, $what) = @_;
	my $offset = -s $node->logfile;

	like($pid, qr/^\d+$/, "$what: there is one to kill");
	kill 'KILL', $pid;
	$node->wait_for_log(qr/\(PID $pid\) was terminated by signal 9/, $offset);
	$node->wait_for_log(qr/database system is ready to accept connections/, $offset);
	return;
}

sub count_some
{
	my ($clients, $transactions) = @_;
	my $load = start_load($node, $script, '-c', $clients, '-t', $transactions);

	ok($load->{run}->finish, 'sessions count') or diag($load->{err});
	return;
}

# --- rotation -----------------------------------------------------------------

# The ledger does not grow beyond what it may, though nothing of one buffer is
# stored, and no count is lost.
my $load = start_load($node, $script, '-c', '4', '-T', '3600');
my ($largest, $rotations, $files) = (0, 0, '');
while ($rotations < 4)
{
	my ($size, $now) = split /\|/, sql(qq{
		SELECT $ledgers, pg_relation_filenode('sb_ledger_0') || ' ' || pg_relation_filenode('sb_ledger_1')});

	$largest = $size if $size > $largest;
	$rotations++ if $now ne $files;
	$files = $now;
	usleep(50_000);
}
$load->{run}->signal('TERM');
$load->{run}->finish;
cmp_ok($largest, '<', 3 * 1024 * 1024, 'the ledger is rotated under load');
balances('rotated under load');
stop_immediately();
balances('rotated, and a crash');
wait_for($node, $db, q{SELECT count(*) = 0 FROM pg_stat_activity WHERE query ~ 'ledger|prepared transactions' AND backend_type = 'statbuffer worker'},
	'the keeper leaves');

# It waits for who is about to append, and for who has the old one open; nobody
# waits for it.  Killed there, it has done nothing.
sub fill_ledger
{
	my ($what) = @_;

	# Until the current one is large.  What is appended to is the one that grows.
	for (1 .. 100)
	{
		count_some(4, 1000);
		return if keeper('rotating');
	}
	die "$what: the ledger is not rotated";
}

my $blocker = $node->background_psql($db);
$blocker->query_safe(q{BEGIN; COMMENT ON MATERIALIZED VIEW sb_ledger_0 IS 'x'; COMMENT ON MATERIALIZED VIEW sb_ledger_1 IS 'x'});
fill_ledger('blocked');
my $pid = wait_for_keeper('rotating', q{wait_event_type = 'Lock'}, 'rotation waits for the lock of another session');
count_some(4, 100);
kill_keeper($pid, 'while it waits');
eval { $blocker->quit };
balances('killed while it waits for others');

$blocker = $node->background_psql($db);
$blocker->query_safe(q{BEGIN; PREPARE a AS SELECT FROM sb_ledger_0; PREPARE b AS SELECT FROM sb_ledger_1});
fill_ledger('blocked');
$pid = wait_for_keeper('rotating', q{wait_event_type = 'Lock'}, 'rotation has appended, and waits to empty the old ledger');
count_some(4, 100);
kill_keeper($pid, 'before it empties the old ledger');
eval { $blocker->quit };
balances('killed before it empties the old ledger');

$blocker = $node->background_psql($db);
$blocker->query_safe(q{BEGIN; PREPARE a AS SELECT FROM sb_ledger_0; PREPARE b AS SELECT FROM sb_ledger_1});
fill_ledger('terminated');
$pid = wait_for_keeper('rotating', q{wait_event_type = 'Lock'}, 'rotation waits again');
sql("SELECT pg_terminate_backend($pid, 100000)");
$pid = wait_for_keeper('rotating', q{wait_event_type = 'Lock'}, 'terminated, another keeper goes on');
$blocker->query_safe('COMMIT');
$blocker->quit;
wait_for($node, $db, qq{SELECT $ledgers < 2 * 1024 * 1024}, 'and rotates the ledger');
balances('terminated');

# --- prepared transactions -----------------------------------------------------

# The commit record of the keeper's transaction is written, and its counts are not
# in memory yet: it waits for a standby that is not there.
$node->append_conf('postgresql.conf', q{synchronous_commit = local});
$node->reload;
sql(q{
	BEGIN;
	INSERT INTO hits VALUES ('prepared', 7);
	INSERT INTO held VALUES ('prepared', 7);
	UPDATE truth SET n = n + 7 WHERE client = 0;
	PREPARE TRANSACTION 'p'});
sql(q{ALTER SYSTEM SET synchronous_standby_names = 'nobody'});
sql(qq{ALTER DATABASE $db SET synchronous_commit = 'on'});
$node->reload;
wait_for($node, $db, q{SELECT current_setting('synchronous_standby_names') = 'nobody'}, 'nobody is waited for');
wait_for_keeper('prepared', 'true', 'the keeper looks for what was prepared');
sql("SELECT pg_terminate_backend(" . keeper('prepared') . ", 100000)");
$node->safe_psql($db, q{SET synchronous_commit = local; COMMIT PREPARED 'p'});
$pid = wait_for_keeper('prepared', q{wait_event = 'SyncRep'}, 'it has written its commit record');
kill_keeper($pid, 'between its commit and its counts');
sql(q{SET synchronous_commit = local; ALTER SYSTEM RESET synchronous_standby_names});
sql(qq{SET synchronous_commit = local; ALTER DATABASE $db RESET synchronous_commit});
$node->reload;
balances('killed between its commit and its counts');

# --- loading --------------------------------------------------------------------

# It does not wait for a buffer that is locked, and others are loaded.
count_some(2, 100);
sql(q{SELECT sb_drain('hits')});
sql(q{INSERT INTO hits VALUES ('x', 1); INSERT INTO held VALUES ('x', 1); UPDATE truth SET n = n + 1 WHERE client = 1});
$node->stop('immediate');
$node->start;
my $total = sql('SELECT sum(n) FROM truth');
is(sql(q{SELECT sum(n) FROM (SELECT n FROM held UNION ALL SELECT n FROM held_target) AS s}), $total, 'loaded');
$node->stop('immediate');
$node->append_conf('postgresql.conf', q{shared_preload_libraries = ''});
$node->start;
my $locker = $node->background_psql($db);
$locker->query_safe('BEGIN; ALTER FOREIGN TABLE held OPTIONS (SET interval \'2h\')');
is(sql(q{SELECT sb_total('x', 'hits')}), '1', 'a buffer is loaded while another one is locked');
wait_for($node, $db, q{SELECT count(*) = 1 FROM pg_stat_activity WHERE query ~ 'loading counts'}, 'the keeper looks again');
$locker->query_safe('COMMIT');
$locker->quit;
is(sql(q{SELECT sb_total('x', 'held')}), '1', 'and then it is loaded, too');
balances('loaded one after the other');
$node->append_conf('postgresql.conf', q{shared_preload_libraries = 'statbuffer'});
$node->restart;

# Killed at any moment of loading: something else each time.
for my $i (1 .. 5)
{
	sql(qq{
		INSERT INTO held SELECT 'many $i ' || g, 1 FROM generate_series(1, 30000) AS g;
		INSERT INTO hits SELECT 'many $i ' || g, 1 FROM generate_series(1, 30000) AS g;
		UPDATE truth SET n = n + 30000 WHERE client = $i});
	$node->stop('immediate');
	$node->start;
	for (1 .. 200)
	{
		my $keeper = sql(q{
			SELECT pid FROM pg_stat_activity WHERE query ~ 'loading counts' AND backend_type = 'statbuffer worker' LIMIT 1});

		next unless $keeper;
		usleep(10_000 * $i);
		my $offset = -s $node->logfile;
		$node->wait_for_log(qr/database system is ready to accept connections/, $offset) if kill 'KILL', $keeper;
		last;
	}
}
balances('killed while it loads');

# --- a damaged row ----------------------------------------------------------------

# It is logged and passed over, others are loaded, and it is kept when the ledger is
# rotated: here, until it is as it was.
sub set_length
{
	my ($length, @files) = @_;
	my $former;

	# Two bytes, then the count, which is 5, then the key.
	$node->stop;
	foreach my $file (map { glob $node->data_dir . "/$_" } @files)
	{
		my $content = slurp_file($file);

		next unless $content =~ /..\x0a.{0,4}?this row is damaged/s;
		$former = substr $content, $-[0], 2, $length;
		open my $handle, '>:raw', $file or die "$file: $!";
		print $handle $content;
		close $handle;
	}
	$node->start;
	return $former;
}

sub ledger_files
{
	return map { "$_*" } split /\n/, sql(q{
		SELECT pg_relation_filepath('sb_ledger_0') UNION ALL SELECT pg_relation_filepath('sb_ledger_1')});
}

SKIP:
{
	skip 'pages have checksums', 16 if sql('SHOW data_checksums') eq 'on';

	balances('before a row is damaged');
	sql(q{ALTER FOREIGN TABLE held OPTIONS (ADD shutdown '0')});
	sql(q{
		INSERT INTO held VALUES ('this row is damaged', 5);
		INSERT INTO held VALUES ('this one is not', 6);
		INSERT INTO hits VALUES ('both', 11);
		UPDATE truth SET n = n + 11 WHERE client = 0});
	my @files = ledger_files();
	my $offset = -s $node->logfile;
	my $length = set_length("\xff\x1f", @files);
	ok(defined $length, 'a row is damaged');
	is(sql(q{SELECT sb_total('this one is not', 'held'), sb_total('this row is damaged', 'held')}), '6|0', 'it is passed over');
	$node->wait_for_log(qr/invalid row \(\d+,\d+\) in "sb_ledger_[01]", the ledger of durable buffers/, $offset);
	for (1 .. 100)
	{
		my %now = map { $_ => 1 } ledger_files();

		last unless grep { $now{$_} } @files;
		count_some(4, 1000);
	}
	is(set_length($length, ledger_files()), "\xff\x1f", 'the row was kept, and is repaired');
	is(sql(q{SELECT sb_total('this row is damaged', 'held')}), '5', 'and loaded');
	balances('repaired');
	sql(q{ALTER FOREIGN TABLE held OPTIONS (DROP shutdown)});
}

# --- databases --------------------------------------------------------------------

# A copy has the counts, too, and stores them by itself.
sql(q{INSERT INTO held VALUES ('copied', 5); INSERT INTO hits VALUES ('copied', 5); UPDATE truth SET n = n + 5 WHERE client = 0});
sql('SELECT pg_sleep(0)');
$node->safe_psql('template1', "CREATE DATABASE copy TEMPLATE $db");
wait_for($node, 'copy', q{SELECT count(*) = 1 FROM held_target WHERE key = 'copied' AND n = 5},
	'a copy of the database stores what it has');
use_node($node, 'copy');
balances('the copy');
use_node($node);
balances('the original');

# Whoever needs a database alone gets it.
$node->safe_psql('copy', q{BEGIN; INSERT INTO held VALUES ('open', 1); PREPARE TRANSACTION 'q'});
wait_for($node, $db, q{SELECT count(*) > 0 FROM pg_stat_activity WHERE query ~ 'prepared transactions' AND datname = 'copy' AND backend_type = 'statbuffer worker'},
	'a keeper looks at what is prepared');
$node->safe_psql('copy', q{ROLLBACK PREPARED 'q'});
$node->safe_psql($db, 'DROP DATABASE copy');

# The server stops while a keeper is at it, and in a database without the extension
# there is none.
sql(q{BEGIN; INSERT INTO held VALUES ('open', 1); PREPARE TRANSACTION 'r'});
wait_for_keeper('prepared', 'true', 'a keeper is there when the server stops');
$node->restart;
sql(q{ROLLBACK PREPARED 'r'});
balances('restarted');
$node->stop;
unlike(slurp_file($node->logfile), qr/PANIC|TRAP|terminated by signal (?!9:)|could not keep/,
	'nobody has died but those who were killed');

sub stop_immediately
{
	$node->stop('immediate');
	$node->start;
	return;
}

done_testing();
