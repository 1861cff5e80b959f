SELECT
    ticket_id,
    subject,
    body
FROM tickets
WHERE created_at >= :interval_start
  AND created_at < :interval_end
ORDER BY ticket_id
