# What the tests of altered definitions share: buffers whose handler is in the
# middle of a call, statements that have to wait for that call, and what must
# become of the counts.
#
# Every statement comes from a session of its own that has not called a
# function of ours.  It must come to its end (statement_timeout guards that),
# and no count may go without a word.

package DdlTest;

use strict;
use warnings;

use Exporter 'import';
use StatbufferTest;
use Test::More;

our @EXPORT = qw(
  $node $db $how $preloaded test_with_servers work_in
  start_statement wait_for_waiting finish_statement
  make_busy hold_more run_while_busy
  wait_for_dropped wait_for_rest wait_for_leaving calls
);

# The server and the database that these functions work with, whether the
# library is preloaded there, and the same as the first words of each test.
our ($node, $db, $how, $preloaded);

# test_with_servers(TEST...): runs the tests twice, on a server that has the
# library preloaded and on one that has not.
sub test_with_servers
{
	my (@tests) = @_;

	foreach (1, 0)
	{
		$preloaded = $_;
		$how = $preloaded ? 'preloaded' : 'not preloaded';
		$node = new_node($preloaded ? 'preloaded' : 'plain',
			'statbuffer.max_workers = 10',
			q{statement_timeout = '120s'},
			$preloaded ? q{shared_preload_libraries = 'statbuffer'} : '');
		$db = 'postgres';
		$_->() foreach @tests;
		$node->stop;
		has_not_crashed($node, "$how: the server never crashed");
	}
	return;
}

# work_in(DATABASE): the database to work with from here on.
sub work_in
{
	($db) = @_;

	use_node($node, $db);
	return;
}

# start_statement(STATEMENT): runs it in the background.
sub start_statement
{
	my ($statement) = @_;
	my $session = start_session($node, $db, $statement);

	$session->{statement} = $statement;
	return $session;
}

# wait_for_waiting(SESSION, TYPE): polls until its statement waits for an event
# of this type, as a test.
sub wait_for_waiting
{
	my ($session, $type) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	wait_for_session($session, "wait_event_type = '$type'", "$how: waits: $session->{statement}");
	return;
}

# finish_statement(SESSION): its statement must come to its end with nothing
# but notices, as two tests.
sub finish_statement
{
	my ($session) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	my $said = finish_session($session, "$how: done: $session->{statement}");

	# where the library is loaded, ALTER tells of counts that have to wait
	$said =~ s/WARNING:  buffer ".*" holds counts that do not fit.*\nDETAIL:.*\nHINT:.*\n//;
	is($said =~ s/NOTICE:.*\n(DETAIL:.*\n)?(and .*\n|drop cascades.*\n)*//r, '', "$how: without a word");
	return;
}

# make_busy(NAME[, OPTIONS]): makes a buffer, and keeps its handler in the
# middle of a call with a key 'k' that was counted 5; another 2 for it, and 100
# for another key, are held meanwhile.  Returns the gate that lets the handler
# go on.
sub make_busy
{
	my ($name, $options) = @_;
	my $gate = close_gate($node, $db);

	make_buffer($node, $db, $name, "interval '20ms', timeout '1h'" . ($options // ''));
	sql(qq{
		ALTER TABLE ${name}_calls ADD who text DEFAULT current_user;
		GRANT ALL ON ${name}_calls, ${name}_bad TO PUBLIC});
	increment($node, $db, $name, 'k', 5);
	hold_more($name);
	return $gate;
}

# hold_more(NAME): waits until that handler is at work, and counts what is held
# meanwhile.
sub hold_more
{
	my ($name) = @_;

	wait_for($node, $db, qq{
			SELECT in_flight = 5 FROM sb_stat_buffers WHERE relid = '$name'::regclass},
		"$how, $name: its handler is in the middle of a call");
	increment($node, $db, $name, 'k', 2);
	increment($node, $db, $name, 'other', 100);
	return;
}

# run_while_busy(STATEMENT, GATE): the statement has to wait for the call that
# is behind the gate, and comes through when that is opened.
sub run_while_busy
{
	my ($statement, $gate) = @_;
	my $session = start_statement($statement);

	wait_for_waiting($session, 'Lock');
	open_gate($gate);
	finish_statement($session);
	return;
}

# wait_for_dropped(COUNT, KEYS, OFFSET, WHAT): the log tells, from the offset
# on, of counts that went with their buffer.
sub wait_for_dropped
{
	my ($count, $keys, $offset, $what) = @_;

	$node->wait_for_log(
		qr/dropped the counts of a buffer that no longer exists.*\n.* held (?:a count|counts) of $count .*in $keys key/, $offset);
	pass("$how, $what: the log tells what was dropped");
	return;
}

# wait_for_rest(NAME): a buffer whose keys are not due for long needs no
# worker.
sub wait_for_rest
{
	my ($name) = @_;

	wait_for($node, $db, "SELECT pid IS NULL FROM sb_stat_buffers WHERE relid = '$name'::regclass",
		"$how, $name: no worker is needed");
	return;
}

# wait_for_leaving(NAME): the worker of a buffer that is gone leaves.
sub wait_for_leaving
{
	my ($name) = @_;

	wait_for($node, $db, qq{
			SELECT count(*) = 0 FROM pg_stat_activity
			WHERE backend_type = 'statbuffer worker' AND query ~ '^$name\\M'},
		"$how, $name: its worker has left");
	return;
}

# calls(NAME): what the handler was given, and as whom it ran.
sub calls
{
	my ($name) = @_;

	return sql("SELECT key, sum(counter), who FROM ${name}_calls GROUP BY key, who ORDER BY key, who");
}

1;
